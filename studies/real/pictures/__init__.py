"""The pictures of the study: a vision language model around SmolLM2, and preferences about easy-vqa's pictures."""

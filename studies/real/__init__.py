"""A study of the methods on real weights: SmolLM2-135M-Instruct, preferences over its own answers."""

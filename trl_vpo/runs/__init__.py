"""What training, generation and evaluation runs share: recipe, record, store."""

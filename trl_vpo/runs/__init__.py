"""The parts shared by training, generation and evaluation runs: recipe, record, store."""

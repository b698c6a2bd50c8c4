"""A training run: launched, resumed, pushed."""

"""Held-out measures of a base model and its adapters."""

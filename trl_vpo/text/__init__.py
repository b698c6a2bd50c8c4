"""Phrases, words, and answers that are read."""

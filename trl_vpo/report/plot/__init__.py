"""Curves of training runs, and how figures look."""

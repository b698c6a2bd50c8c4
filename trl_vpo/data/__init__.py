"""Rows of preference data: read, checked, and collated into tree batches."""

"""Task files that lmms-eval does not have."""

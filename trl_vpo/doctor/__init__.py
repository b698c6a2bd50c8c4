"""A recipe looked at before it runs: its options, data, modules and memory."""

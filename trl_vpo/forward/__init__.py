"""One model call over a tree batch: layouts, attention, per-token scores."""

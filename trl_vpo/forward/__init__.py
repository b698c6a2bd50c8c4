"""One model call over a tree batch: its layout, log-probs and KL; a new model family is made known in families.py."""

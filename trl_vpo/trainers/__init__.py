"""The trainers, a file for each method; a new one also needs a loss (losses/) and a name (training/methods.py)."""

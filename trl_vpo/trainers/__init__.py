"""The trainers, a file for each method; a new one also needs its loss (losses.py) and its name (training/methods.py)."""

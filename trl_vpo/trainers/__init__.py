"""The trainers: one file for each method, and what they share."""

"""Any run that can go on where it stopped, and what it writes down of itself."""

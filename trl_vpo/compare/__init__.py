"""Methods compared: each recipe trained, all of them measured on the same held-out rows."""

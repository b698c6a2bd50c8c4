"""Preference data made by the model itself, by the pipelines of the three papers."""

"""Pages for people: preference data and curves."""

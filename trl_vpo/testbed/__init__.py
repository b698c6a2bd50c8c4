"""A small world of moving shapes, its tiny model, and the quickstart."""

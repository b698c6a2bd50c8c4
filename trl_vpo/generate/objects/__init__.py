"""Objects of an image: their names, boxes and detectors."""

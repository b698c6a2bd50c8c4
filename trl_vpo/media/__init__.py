"""Sources of images and videos become frames."""

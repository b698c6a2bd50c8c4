"""Studies of the methods, outside of the package."""

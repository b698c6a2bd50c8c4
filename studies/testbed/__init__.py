"""The methods compared on the small world of moving shapes."""

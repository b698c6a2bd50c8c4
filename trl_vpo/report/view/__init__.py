"""The page that `trl-vpo view` writes."""

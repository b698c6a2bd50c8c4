"""A small world of moving shapes and a tiny model of it: the methods can be seen to work without any download."""

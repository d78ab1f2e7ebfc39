"""A data set on disk: what it says of itself, what is in it, and whether that is true."""

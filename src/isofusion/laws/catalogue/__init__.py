"""The laws of the literature, each a small class, and the base to write your own."""

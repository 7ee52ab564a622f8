"""Building blocks that several methods share, each with its equation."""

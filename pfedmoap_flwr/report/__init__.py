"""What came out: the run folder, the tables."""

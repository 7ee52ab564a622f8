"""The commands beside a run: looking at data, getting it ready, and checking the machine."""

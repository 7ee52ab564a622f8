"""Where a run computes: in this process, or in processes that Flower starts."""

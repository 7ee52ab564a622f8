"""Who holds what: data sets, few-shot sampling, partitions."""

SPLITS = ("train", "validation", "test")

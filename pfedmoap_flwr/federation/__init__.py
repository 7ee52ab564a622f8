"""How it travels: the Strategy, the client's work, records, state on disk, the in-process grid."""

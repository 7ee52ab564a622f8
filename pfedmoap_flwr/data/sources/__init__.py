"""Where images come from: the hub, folders, files."""

"""The command `pfedmoap`."""

"""How it travels: the two Flower apps, the Strategy, the client, messages and their checks."""

"""How a deployment over a network is prepared, rehearsed on one machine, and checked on a node."""

"""What a node is made of, as far as its network and its GPUs go, and in which rack it is. Imports no torch."""

"""The agent of a node, its workers, and what it shares with them."""

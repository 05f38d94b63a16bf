"""A run as a whole, from what it wrote down: where its time went, what happened to it, and what that cost."""

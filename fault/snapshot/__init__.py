"""Training state of a step in host memory, which outlives the workers, and what makes it survive lost nodes."""

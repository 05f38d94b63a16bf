"""``evermesh doctor``: what this machine can do for jobs, what it cannot, and the way out."""

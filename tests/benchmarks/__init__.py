"""Benchmarks: ours and the peers in one process tree on one machine, as tables and as JSON."""

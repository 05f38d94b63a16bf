"""Runs a job with faults, and reports what became of it."""

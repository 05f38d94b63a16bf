"""Saving while training goes on: one copy to shared memory, then another process writes, checks and commits."""

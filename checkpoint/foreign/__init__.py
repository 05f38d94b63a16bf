"""Readers of other projects' training checkpoints: they make an index, convert nothing on disk and execute nothing."""

"""Where checkpoints are: file systems and object stores behind one small interface."""

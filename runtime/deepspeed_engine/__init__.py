"""Trains with the library DeepSpeed (extra ``deepspeed``) under our trainer, batch plans and checkpoints."""

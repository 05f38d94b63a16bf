"""The native tap: one kernel in front of all collectives in torch's dispatcher, built once per torch and compiler."""

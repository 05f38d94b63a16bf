"""Every collective and message of a rank as one record of 64 bytes, in a ring that others can read from outside."""

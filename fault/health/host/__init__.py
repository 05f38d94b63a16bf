"""Checks of memory, disks, network, clock and load: pure functions of what the kernel tells in files."""

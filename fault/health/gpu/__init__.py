"""Checks of GPUs: what the driver tells through NVML, and what it wrote into the kernel log."""

"""Attention over packed documents and rings: fused kernels per device, and what passes keys and values around."""

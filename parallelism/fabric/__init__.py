"""The paths that a job's traffic takes through a network of leaf and spine switches: which there are, what each carries, and
how to spread what is sent so that no link carries more than it has to. Pure computation; imports no torch.

The idea of planning paths, because collectives are few, long-lived and known flows, is that of C4P (arXiv 2406.04594).
"""

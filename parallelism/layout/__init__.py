"""Layouts: what one says, what it needs of memory and time, and which one suits a model, a cluster and its data.

Only what a layout says is imported here; ``memory``, ``throughput``, ``search`` and ``switching`` are imported by name: the
planner, which they use, needs layouts itself.
"""

from evermesh.parallelism.layout.degrees import ActivationPolicy, Layout, check_folding

__all__ = ["ActivationPolicy", "Layout", "check_folding"]

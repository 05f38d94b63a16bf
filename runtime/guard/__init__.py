"""The step guard: bad steps update nothing, their samples are tried again, and computations are checked by repeating them."""

from evermesh.runtime.guard.config import GuardConfig, ProbePolicy, ReplicaPolicy, SpikePolicy

__all__ = ["GuardConfig", "ProbePolicy", "ReplicaPolicy", "SpikePolicy"]

"""The errors of erasure codes.

EvermeshError
├── CodeImpossible      (ValueError)     there is no such code
├── TooManyErasures     (ValueError)     fewer parts are left than a code needs
└── EngineUnusable      (RuntimeError)   an engine was asked for that does not work here
"""

from evermesh.parallelism.errors import EvermeshError


class CodeImpossible(EvermeshError, ValueError):
    """There is no code with these numbers of parts."""


class TooManyErasures(EvermeshError, ValueError):
    """More parts are lost than a code has parity; ``lost`` and ``tolerated`` are the two numbers."""

    def __init__(self, what: str, lost: int, tolerated: int) -> None:
        super().__init__(
            f"{what}: {lost} parts are lost or corrupt, but {tolerated} parity parts make up for {tolerated}. "
            "Load an older snapshot, or a checkpoint from storage."
        )
        self.lost, self.tolerated = lost, tolerated


class EngineUnusable(EvermeshError, RuntimeError):
    """An engine was asked for that does not work on this machine; the message says why."""

"""Errors of the recorder.

EvermeshError
├── RingUnreadable  (ValueError)    a file is no ring, or of another version
└── TapUnusable     (RuntimeError)  the native tap cannot be built, loaded, or does not do what it should
"""

from evermesh.parallelism.errors import EvermeshError


class RingUnreadable(EvermeshError, ValueError):
    """A file is no ring, is being made, or is of another version."""


class TapUnusable(EvermeshError, RuntimeError):
    """The native tap cannot be built or loaded, or does not do what it should; says why. Python records instead."""

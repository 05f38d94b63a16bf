"""The root of every exception the project raises, and the errors of this room.

    EvermeshError                   (Exception)
    ├── LayoutDoesNotFit            (ValueError)    degrees, ranks and capacity do not go together
    ├── SequenceTooLong             (ValueError)    no ring can hold a sequence
    ├── PlanInvalid                 (ValueError)    the verifier refused a batch plan
    ├── TrafficImpossible           (ValueError)    a network cannot carry what a job sends, or is not described
    └── UnsupportedKernel           (NotImplementedError)  no fused attention for this device and dtype

Other rooms derive their trees from ``EvermeshError`` in their own ``errors.py``.
"""


class EvermeshError(Exception):
    """An error whose message states the fact, the numbers and the way out; shown to users without a traceback."""


class LayoutDoesNotFit(EvermeshError, ValueError):
    """The layout asks for a number of ranks, or a degree, that is not there.

    ``axis`` is the degree that is wrong; None: their product, the number of ranks, is.
    """

    def __init__(self, message: str, axis: str | None = None) -> None:
        self.axis = axis
        super().__init__(message)


class SequenceTooLong(EvermeshError, ValueError):
    """A sequence exceeds what all HDP ranks hold together."""

    def __init__(self, sequence: int, length: int, capacity: int, hdp: int) -> None:
        self.sequence, self.length, self.capacity, self.hdp = sequence, length, capacity, hdp
        super().__init__(
            f"sequence {sequence} has {length:,} tokens, but {hdp} HDP ranks with a capacity of {capacity:,} tokens "
            f"hold {hdp * capacity:,}. Set layout.capacity to at least {-(-length // hdp):,}, use at least "
            f"{-(-length // capacity)} ranks, or lower data.context."
        )


class PlanInvalid(EvermeshError, ValueError):
    """A batch plan breaks a rule; the message names the rule, the rank and the sequence."""


class TrafficImpossible(EvermeshError, ValueError):
    """Ranks that have to talk have no path, or the topology does not say how they are wired."""


class UnsupportedKernel(EvermeshError, NotImplementedError):
    """There is no fused attention kernel for this device and dtype."""

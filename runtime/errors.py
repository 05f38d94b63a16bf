"""The errors of this room.

EvermeshError
├── TrainingDiverged  (ArithmeticError)  too many steps in a row with values that are not finite
└── OtherRun          (ValueError)       a checkpoint of another model, tokenizer or data order
"""

from evermesh.parallelism.errors import EvermeshError


class TrainingDiverged(EvermeshError, ArithmeticError):
    """Loss or gradients stay non-finite; the newest checkpoint is from before."""


class OtherRun(EvermeshError, ValueError):
    """The checkpoint was made by a run with another model, tokenizer or order of the data."""

"""The errors of this room.

EvermeshError
├── TrainingDiverged    (ArithmeticError)  too many steps in a row with values that are not finite, or spike
├── CorruptionFound     (RuntimeError)     a computation repeated had other bits, or copies of parameters have
├── VocabularyTooSmall  (ValueError)       the tokenizer has more entries than the model has rows
├── UnsupportedModel    (ValueError)       a model of another project that this version cannot build, write or train
├── BatchInvalid        (ValueError)       documents of a script that cannot be trained on, or that differ among ranks
├── EngineMissing       (ImportError)      a library that a layout asks for is not installed
├── EngineDiffers       (RuntimeError)     a library does not do what the adapter to it expects
├── CannotCompile       (RuntimeError)     there is no compiler for the device
└── OtherRun            (ValueError)       a checkpoint of another model, tokenizer or data order
"""

from evermesh.parallelism.errors import EvermeshError


class TrainingDiverged(EvermeshError, ArithmeticError):
    """Loss or gradients stay non-finite, or far above those before; the newest checkpoint is from before."""


class CorruptionFound(EvermeshError, RuntimeError):
    """A computation that was repeated had other bits, or ranks hold other bits of the same parameters. The message names the
    ranks; no update was made from what they have."""


class EngineMissing(EvermeshError, ImportError):
    """A library that the layout asks for is not installed."""


class EngineDiffers(EvermeshError, RuntimeError):
    """A library does not do what the adapter to it expects; another version of it may."""


class OtherRun(EvermeshError, ValueError):
    """The checkpoint was made by a run with another model, tokenizer or order of the data."""


class VocabularyTooSmall(EvermeshError, ValueError):
    """The tokenizer of the data has more entries than the model has rows of embedding and head."""


class UnsupportedModel(EvermeshError, ValueError):
    """A model of another project has a family or a setting that this version does not know, or ours cannot be one of them."""


class BatchInvalid(EvermeshError, ValueError):
    """A document has nothing to predict, or the ranks were given different documents."""


class CannotCompile(EvermeshError, RuntimeError):
    """There is no compiler for the device."""

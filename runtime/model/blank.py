"""Layers whose weights hold nothing yet: ``Decoder.initialize`` draws their first values, or a checkpoint is read into them.

To draw values that are replaced takes as long as to read 64 MiB from memory, in every restart.
"""

from torch import nn


class Linear(nn.Linear):
    """``nn.Linear``."""

    def reset_parameters(self) -> None:
        """Nothing."""


class Embedding(nn.Embedding):
    """``nn.Embedding``."""

    def reset_parameters(self) -> None:
        """Nothing."""

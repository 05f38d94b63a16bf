"""The formats that checkpoints are written in; imports no torch."""

from typing import Literal, get_args

Format = Literal[
    "evermesh",
    "safetensors",
    "torch-distributed",
    "deepspeed-zero1",
    "deepspeed-zero2",
    "deepspeed-zero3",
    "deepspeed-universal",
]
FORMATS: tuple[Format, ...] = get_args(Format)

"""The element types a checkpoint can hold, by their torch names."""

from typing import NamedTuple


class Dtype(NamedTuple):
    """How an element type is stored."""

    code: str
    """Its name in a safetensors header."""
    num_bytes: int
    """Bytes of one element."""


DTYPES = {
    "bool": Dtype("BOOL", 1),
    "uint8": Dtype("U8", 1),
    "int8": Dtype("I8", 1),
    "float8_e4m3fn": Dtype("F8_E4M3", 1),
    "float8_e5m2": Dtype("F8_E5M2", 1),
    "uint16": Dtype("U16", 2),
    "int16": Dtype("I16", 2),
    "float16": Dtype("F16", 2),
    "bfloat16": Dtype("BF16", 2),
    "uint32": Dtype("U32", 4),
    "int32": Dtype("I32", 4),
    "float32": Dtype("F32", 4),
    "uint64": Dtype("U64", 8),
    "int64": Dtype("I64", 8),
    "float64": Dtype("F64", 8),
    "complex64": Dtype("C64", 8),
}

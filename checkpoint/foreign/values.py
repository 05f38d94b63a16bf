"""What a foreign checkpoint holds besides large tensors, as JSON values where it can be. Imports no torch."""

import math
import struct
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.foreign.pickle_machine import Record
from evermesh.checkpoint.foreign.torch_files import TorchTensor
from evermesh.checkpoint.stores.looking import opened
from evermesh.checkpoint.stores.places import Place

_MOST_VALUES = 1_000_000
_MOST_DEPTH = 64
_MOST_INTEGER_BITS = 4096
_NOT_JSON = object()
_CODES = {
    "bool": "?",
    "uint8": "B",
    "int8": "b",
    "int16": "h",
    "uint16": "H",
    "int32": "i",
    "uint32": "I",
    "int64": "q",
    "uint64": "Q",
    "float16": "e",
    "float32": "f",
    "float64": "d",
}


class _TooMuch(Exception):
    """A value has too many parts, or contains itself."""


class Values:
    """Turns values of pickles into JSON values, and remembers where it could not.

    Tuples become arrays, tensors of one element numbers, objects of known classes their attributes, keys text. Larger
    tensors are no values, and are kept as what they are. Values that are shared many times are bounded in number.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self.left_out: list[str] = []
        self.tensors: dict[str, TorchTensor] = {}
        """Tensors of more than one element, by their places."""
        self._count = 0

    def json(self, value: Any, place: str) -> JsonValue:
        """``value`` without what is no JSON value; what had to be left out is named after ``place``."""
        return self.objects({place: value}, "").get(place)

    def objects(self, values: Mapping[str, Any], place: str) -> dict[str, JsonValue]:
        """Those of ``values`` that are JSON values."""
        found = {name: self._bounded(value, f"{place}{name}") for name, value in values.items()}
        return {name: value for name, value in found.items() if value is not _NOT_JSON}

    def _bounded(self, value: Any, place: str) -> Any:
        self._count = 0
        try:
            return self._json(value, place, 0)
        except _TooMuch:
            self.left_out.append(f"{place}: more than {_MOST_VALUES:,} values, or deeper than {_MOST_DEPTH}")
            return _NOT_JSON

    def _json(self, value: Any, place: str, depth: int) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES or depth > _MOST_DEPTH:
            raise _TooMuch
        if isinstance(value, Record) and isinstance(value.state, dict):
            value = value.state
        match value:
            case None | bool() | float() | str():
                return value
            case int() if value.bit_length() <= _MOST_INTEGER_BITS:
                return value
            case dict() if all(isinstance(key, str | int) for key in value):
                below = ((str(key), self._json(v, f"{place}.{key}", depth + 1)) for key, v in value.items())
                return {key: found for key, found in below if found is not _NOT_JSON}
            case list() | tuple():
                items = [self._json(v, f"{place}[{index}]", depth + 1) for index, v in enumerate(value)]
                if all(item is not _NOT_JSON for item in items):
                    return items
            case TorchTensor() if math.prod(value.shape) == 1 and value.dtype in (*_CODES, "bfloat16"):
                return number(value)
            case TorchTensor():
                self.tensors[place] = value
                return _NOT_JSON
        self.left_out.append(f"{place}: {_name(value)}")
        return _NOT_JSON


def number(tensor: TorchTensor) -> int | float | bool:
    """The value of a tensor of one element; reads its few bytes."""
    num_bytes = DTYPES[tensor.dtype].num_bytes
    with opened(tensor.file) as file:
        file.seek(tensor.position)
        raw = file.read(num_bytes)
    if len(raw) != num_bytes:
        raise ForeignUnusable(tensor.file, f"it ends at byte {tensor.position + len(raw):,}", _USE)
    if tensor.dtype == "bfloat16":
        raw, code = b"\0\0" + raw, "f"
    else:
        code = _CODES[tensor.dtype]
    value: int | float | bool = struct.unpack(f"<{code}", raw)[0]
    return value


def _name(value: Any) -> str:
    if isinstance(value, Record):
        return value.name
    if isinstance(value, TorchTensor):
        return f"tensor {value.dtype} {list(value.shape)}"
    return type(value).__name__


_USE = "Load an earlier checkpoint, or copy this one again."

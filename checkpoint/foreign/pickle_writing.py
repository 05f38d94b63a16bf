"""A writer of pickles that imports nothing: globals of other libraries are named, not looked up.

The counterpart of ``pickles``: a value is plain (numbers, text, lists, tuples, dicts), an ``Ordered`` dict, or one of the
three below. Anything else is an error, so that no object gets into a file by accident. Opcodes are those of the module
``pickletools``, protocol 2, as ``torch.save`` uses it.
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from evermesh.checkpoint.contents import Content

_PROTOCOL, _STOP = b"\x80\x02", b"."
_MARK, _EMPTY_LIST, _EMPTY_DICT, _EMPTY_TUPLE = b"(", b"]", b"}", b")"
_APPENDS, _SET_ITEMS, _TUPLE = b"e", b"u", b"t"
_REDUCE, _BUILD, _NEW_OBJECT, _PERSISTENT = b"R", b"b", b"\x81", b"Q"
_CONSTANTS = {None: b"N", True: b"\x88", False: b"\x89"}


@dataclass(frozen=True, slots=True)
class Global:
    """A function, class or constant of a library."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a function or class of a library makes of arguments."""

    function: Global
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of a class of a library, made without calling it, and its attributes (or its own kind of state)."""

    cls: Global
    state: Any


class Ordered(dict[str, Any]):
    """Becomes an ``OrderedDict``."""


_ORDERED = Global("collections", "OrderedDict")
_STORAGES = {
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
}


class Pickled:
    """The pickle of a value, and the contents that its tensors are stored in, by the numbers of their storages."""

    def __init__(self, value: Any) -> None:
        self.contents: list[Content] = []
        self._keys: dict[int, str] = {}
        """By identity: a content that is there twice is stored once."""
        self._parts = [_PROTOCOL]
        self._write(value)
        self._parts.append(_STOP)

    @property
    def payload(self) -> bytes:
        """The pickle."""
        return b"".join(self._parts)

    def _write(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self._parts.append(_CONSTANTS[value])
            return
        kind = next((kind for kind in _WRITERS if isinstance(value, kind)), None)
        if kind is None:
            raise TypeError(f"a {type(value).__name__} is not written into files of other projects")
        _WRITERS[kind](self, value)

    def _number(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self._parts.append(b"J" + struct.pack("<i", value))
            return
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        assert len(raw) < 256, "integers of objects are bounded"
        self._parts.append(b"\x8a" + bytes([len(raw)]) + raw)

    def _float(self, value: float) -> None:
        self._parts.append(b"G" + struct.pack(">d", value))

    def _text(self, value: str) -> None:
        raw = value.encode("utf-8", "surrogatepass")
        self._parts.append(b"X" + struct.pack("<I", len(raw)) + raw)

    def _items(self, values: Iterable[Any], before: bytes, after: bytes) -> None:
        self._parts.append(before)
        for value in values:
            self._write(value)
        self._parts.append(after)

    def _list(self, values: list[Any]) -> None:
        self._items(values, _EMPTY_LIST + _MARK, _APPENDS)

    def _tuple(self, values: tuple[Any, ...]) -> None:
        self._items(values, _MARK, _TUPLE)

    def _dict(self, values: dict[Any, Any], empty: bytes = _EMPTY_DICT) -> None:
        self._items((part for pair in values.items() for part in pair), empty + _MARK, _SET_ITEMS)

    def _ordered(self, values: Ordered) -> None:
        self._call(Call(_ORDERED))
        self._dict(values, b"")

    def _global(self, value: Global) -> None:
        self._parts.append(f"c{value.module}\n{value.name}\n".encode())

    def _call(self, value: Call) -> None:
        self._global(value.function)
        self._tuple(value.arguments)
        self._parts.append(_REDUCE)

    def _instance(self, value: Instance) -> None:
        self._global(value.cls)
        self._parts.append(_EMPTY_TUPLE + _NEW_OBJECT)
        self._write(value.state)
        self._parts.append(_BUILD)

    def _tensor(self, content: Content) -> None:
        """As ``torch`` describes a contiguous tensor that is all of its storage."""
        if id(content) not in self._keys:
            self._keys[id(content)] = str(len(self.contents))
            self.contents.append(content)
        is_old = content.dtype in _STORAGES  # later types share an untyped storage, and say themselves what they are
        typed = Global("torch", _STORAGES[content.dtype]) if is_old else Global("torch.storage", "UntypedStorage")
        count = content.num_elements if is_old else content.num_bytes
        self._global(Global("torch._utils", "_rebuild_tensor_v2" if is_old else "_rebuild_tensor_v3"))
        self._parts.append(_MARK)
        self._tuple(("storage", typed, self._keys[id(content)], "cpu", count))
        self._parts.append(_PERSISTENT)
        for value in (0, content.shape, _strides(content.shape), False, Call(_ORDERED)):
            self._write(value)
        if not is_old:
            self._global(Global("torch", content.dtype))
        self._parts.append(_TUPLE + _REDUCE)


_WRITERS: dict[type, Callable[[Pickled, Any], None]] = {
    int: Pickled._number,
    float: Pickled._float,
    str: Pickled._text,
    list: Pickled._list,
    tuple: Pickled._tuple,
    Ordered: Pickled._ordered,
    dict: Pickled._dict,
    Global: Pickled._global,
    Call: Pickled._call,
    Instance: Pickled._instance,
    Content: Pickled._tensor,
}
"""By type; subclasses come first."""


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))

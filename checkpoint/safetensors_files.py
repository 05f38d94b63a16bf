"""Headers of safetensors files that others wrote, read with distrust; imports no torch.

Format: eight bytes with the length of the header, little-endian; the header, JSON; then the tensors, row-major. Nothing
in such a file is ever executed.
"""

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import DAMAGE, StoreUnusable, WeightsUnusable
from evermesh.checkpoint.stores.looking import opened
from evermesh.checkpoint.stores.places import Place

_MOST_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_DTYPES = {dtype.code: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor in a file."""

    file: Place
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Position of its first byte in the file."""


def read_header(file: Place) -> dict[str, FileTensor]:
    """The tensors of a safetensors file, by name. Raises as ``read_notes`` does."""
    return read_notes(file)[0]


def read_notes(file: Place) -> tuple[dict[str, FileTensor], dict[str, Any]]:
    """The tensors of a safetensors file, by name, and the notes of its writer (``__metadata__``).

    Raises:
        WeightsUnusable: it is missing, truncated, or not what the format allows.
    """
    try:
        with opened(file) as stream:
            num_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MOST_HEADER_BYTES, num_bytes - 8):
                raise WeightsUnusable(file, f"its header says {length:,} bytes; the file has {num_bytes:,}", _AGAIN)
            header = json.loads(stream.read(length))
            notes = header.pop("__metadata__", {}) if isinstance(header, dict) else None
            if not isinstance(notes, dict):
                raise WeightsUnusable(file, "its header is no object of tensors", _AGAIN)
    except StoreUnusable:
        raise
    except OSError as error:
        raise WeightsUnusable(file, f"it cannot be read: {error.strerror}", _AGAIN) from error
    except WeightsUnusable:
        raise
    except DAMAGE as error:  # not JSON, or not text
        raise WeightsUnusable(file, f"its header is no JSON: {error}", _AGAIN) from error
    return {name: _tensor(file, name, entry, 8 + length, num_bytes) for name, entry in header.items()}, notes


_AGAIN = "Fetch the file again."


def _tensor(file: Place, name: str, entry: Any, data: int, num_bytes: int) -> FileTensor:
    try:
        code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
            raise ValueError("sizes and places are whole numbers")
    except DAMAGE as error:
        raise WeightsUnusable(file, f"its entry of {name[:100]} is {str(entry)[:200]}", _AGAIN) from error
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise WeightsUnusable(file, f"{name} is of type {code}", f"Convert it to one of {', '.join(_DTYPES)}.")
    expected = math.prod(shape) * DTYPES[dtype].num_bytes
    if not 0 <= start <= stop <= num_bytes - data or stop - start != expected:
        raise WeightsUnusable(
            file,
            f"{name} of {list(shape)} {code} takes {expected:,} bytes, but is said to be in bytes {start:,} to {stop:,} "
            f"of {num_bytes - data:,}",
            _AGAIN,
        )
    return FileTensor(file, dtype, shape, data + start)

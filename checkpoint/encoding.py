"""The bytes of a manifest and of the head of a safetensors file, from plain values.

Needs nothing but the standard library and xxhash, so that the process that writes in the background starts at once.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SEAL = b'{"xxh3_64":"'
"""A manifest begins with it; the checksum of the object without this field follows."""
_ALIGNMENT_BYTES = 64


class HeaderEntry(NamedTuple):
    """One tensor in the head of a safetensors file."""

    key: str
    code: str
    """Of its element type."""
    shape: tuple[int, ...]
    num_bytes: int


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The JSON of a manifest, the xxh3-64 of the object in front. Numbers that are not finite become ``NaN`` and such."""
    body = json.dumps(manifest, separators=(",", ":")).encode()
    return SEAL + xxhash.xxh3_64_hexdigest(body).encode() + b'",' + body[1:]


def safetensors_head(entries: Sequence[HeaderEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The head of a file that holds ``entries`` in this order, padded so that the data is aligned. Keys are unique."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        stop = offset + entry.num_bytes
        fields[entry.key] = {"dtype": entry.code, "shape": entry.shape, "data_offsets": (offset, stop)}
        offset = stop
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text

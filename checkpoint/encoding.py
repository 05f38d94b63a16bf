"""The bytes of a manifest, of the index of a rank and of the head of a safetensors file, from plain values.

Needs nothing but the standard library and xxhash, so that the process that writes in the background starts at once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.stores.store import store_of

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SEAL, SEAL_END = b'{"xxh3_64":"', b'",'
"""Around the checksum with which a manifest begins: of the object without this field."""
_ALIGNMENT_BYTES = 64
_MOST_HEAD_BYTES = 1 << 16


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
    return SEAL + xxhash.xxh3_64_hexdigest(body).encode() + SEAL_END + body[1:]


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


class PlacedPart(NamedTuple):
    """Some elements of a tensor that follow others in a file."""

    name: str
    """Of the tensor."""
    region: dict[str, Any]
    start: int
    """First element of the region's row-major storage."""
    stop: int
    num_bytes: int


def extents_in_order(file: str, offset: int, parts: Iterable[PlacedPart]) -> dict[str, list[dict[str, Any]]]:
    """By tensor: where its elements are, if ``parts`` follow each other in a file from byte ``offset`` on."""
    extents: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        place = {"file": file, "offset": offset, "region": part.region, "start": part.start, "stop": part.stop}
        extents.setdefault(part.name, []).append(place)
        offset += part.num_bytes
    return extents


class IndexHead(NamedTuple):
    """The first line of an index: all that the commit asks of a rank. It holds the checksum of the rest, so its own is the
    root of everything that the rank wrote."""

    xxh3_64: str
    """Of the line."""
    num_bytes: int
    """Of the index."""
    files: dict[str, int]
    """Bytes of the data files, by name."""
    told: dict[str, Any]
    """What the rank tells besides: the digest of its shard map, the bytes of its tensors, those that it wrote."""


def index_payload(
    files: Mapping[str, tuple[int, str]], extents: Mapping[str, Sequence[Mapping[str, Any]]], told: Mapping[str, Any]
) -> bytes:
    """The index of what a rank wrote: one line with sizes, one with the checksums of chunks and the extents of tensors.

    Args:
        files: size in bytes and checksums of every data file.
        extents: by tensor.
        told: numbers and texts that go into the first line.
    """
    body = {"checksums": {name: checksums for name, (_, checksums) in files.items()}, "extents": extents}
    rest = json.dumps(body, separators=(",", ":")).encode()
    sizes = {name: num_bytes for name, (num_bytes, _) in files.items()}
    head = {"rest": xxhash.xxh3_64_hexdigest(rest), "rest_bytes": len(rest), "files": sizes, **told}
    return json.dumps(head, separators=(",", ":")).encode() + b"\n" + rest


def read_index_heads(files: Sequence[Place]) -> list[IndexHead]:
    """The first lines of indexes in one folder, which ranks of this save have just written."""
    return list(map(index_head, store_of(files[0]).first_lines(files, _MOST_HEAD_BYTES))) if files else []


def index_head(line: bytes) -> IndexHead:
    """The head that a line of an index is, its end included. Raises ``ValueError`` for any other line."""
    try:
        told = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply for the head of an index") from error
    is_head = isinstance(told, dict) and isinstance(told.get("rest_bytes"), int) and isinstance(told.get("files"), dict)
    if not is_head:
        raise ValueError("not the head of an index")
    num_bytes = len(line) + told.pop("rest_bytes")
    return IndexHead(xxhash.xxh3_64_hexdigest(line), num_bytes, told.pop("files"), told)

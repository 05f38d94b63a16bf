"""What makes the copy of a rank a snapshot: digests of every MiB, an index, and a record that names it."""

import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from evermesh.checkpoint.encoding import index_payload
from evermesh.checkpoint.files import CHUNK_BYTES, DIGITS
from evermesh.checkpoint.merging import told_of
from evermesh.fault.snapshot.keeper.slots import Header, Record, SlotFiles, State


class Reservation(NamedTuple):
    """What a rank said once about all its snapshots."""

    generation: int
    rank: int
    shard_map: str
    data_bytes: int
    tensor_bytes: int
    """Of the data file, without its head."""
    extents: Mapping[str, Any]
    """By tensor: where its elements are in the data file."""


class NotSealed(Exception):
    """A copy did not become a snapshot."""


def seal(
    area: Path, told: Reservation, number: int, step: int, is_wanted: Callable[[], bool], then: State = "sealed"
) -> Record:
    """Make what lies in a slot a snapshot; the slot is in the state ``then`` when this returns.

    Raises:
        NotSealed: the slot is not being written to, or nobody wants it any more.
        OSError: there is no room for the index.
    """
    files = SlotFiles.of(area, told.rank, number)
    header = Header(files.header)
    try:
        if header.state != "writing" or header.ticket != step:
            raise NotSealed(f"slot {number} of rank {told.rank} is {header.state}, and not for step {step}")
        data = {files.data.name: (told.data_bytes, _checksums(files, is_wanted))} if told.data_bytes else {}
        values = told_of(told.shard_map, told.tensor_bytes, told.data_bytes)
        more = {"generation": told.generation, "step": step, "objects": objects_digest(files)}
        payload = index_payload(data, told.extents, values | more)
        files.index.write_bytes(payload)
        root = xxhash.xxh3_64_hexdigest(payload[: payload.index(b"\n") + 1])
        record = Record(told.rank, told.generation, step, told.data_bytes, len(payload), root, told.shard_map)
        if is_wanted() and header.ticket == step:
            header.hold(record, then)
        if header.ticket != step:  # given up, and written to again meanwhile
            header.state = "writing"
            raise NotSealed(f"slot {number} of rank {told.rank} is written to again")
        if not is_wanted():
            raise NotSealed(f"another attempt than {told.generation} has begun")
        return record
    finally:
        header.close()


def objects_digest(files: SlotFiles) -> str:
    """xxh3-64 of what a rank says besides tensors."""
    return xxhash.xxh3_64_hexdigest(files.objects.read_bytes())


def rotten_chunks(files: SlotFiles, pace: Callable[[int], None]) -> list[int]:
    """The chunks of a sealed slot whose bytes are not those that were sealed; ``pace`` takes the bytes that were read."""
    record = _record(files)
    if record is None or not record.data_bytes:
        return []
    line, _, rest = files.index.read_bytes().partition(b"\n")
    is_whole = xxhash.xxh3_64_hexdigest(line + b"\n") == record.root
    if not is_whole or json.loads(line)["rest"] != xxhash.xxh3_64_hexdigest(rest):
        return [0]
    expected = json.loads(rest)["checksums"][files.data.name]
    wrong = []
    with _mapped(files, record.data_bytes) as memory:
        for chunk, digest in enumerate(_digests(memory)):
            if digest != expected[chunk * DIGITS : (chunk + 1) * DIGITS]:
                wrong.append(chunk)
            pace(CHUNK_BYTES)
    return wrong


def _record(files: SlotFiles) -> Record | None:
    header = Header(files.header)
    try:
        return header.record
    finally:
        header.close()


def _checksums(files: SlotFiles, is_wanted: Callable[[], bool]) -> str:
    found = []
    with _mapped(files, files.data.stat().st_size) as memory:
        for digest in _digests(memory):
            if not is_wanted():
                raise NotSealed("another attempt has begun")
            found.append(digest)
    return "".join(found)


def _digests(memory: memoryview) -> Iterator[str]:
    for begin in range(0, memory.nbytes, CHUNK_BYTES):
        yield xxhash.xxh3_64_hexdigest(memory[begin : begin + CHUNK_BYTES])


@contextmanager
def _mapped(files: SlotFiles, num_bytes: int) -> Iterator[memoryview]:
    """The data file. Raises ``OSError`` if it is shorter: reading what is not there would end this process."""
    descriptor = os.open(files.data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size != num_bytes:
            raise OSError(f"{files.data} has {size:,} bytes, not {num_bytes:,}")
        with mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as memory:
            yield memory
    finally:
        os.close(descriptor)

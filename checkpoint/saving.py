"""Saving: every rank writes its part once, then one step on rank 0 makes the checkpoint visible."""

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from evermesh.checkpoint import committing as folder
from evermesh.checkpoint.agreement import RankFailure, together
from evermesh.checkpoint.committing import Attempt, data_name, index_name
from evermesh.checkpoint.encoding import IndexHead, extents_in_order, index_payload, read_index_heads, sealed
from evermesh.checkpoint.errors import CheckpointNotSaved, ParityUnusable, StoreUnusable
from evermesh.checkpoint.file_plan import PlannedPart, placed_part, planned_parts, saved_map
from evermesh.checkpoint.files import LateFiles
from evermesh.checkpoint.format import safetensors_header
from evermesh.checkpoint.merging import merged_manifest, told_of
from evermesh.checkpoint.parity import Stripes, parts_of, protect
from evermesh.checkpoint.retention import Retention, as_retention
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of
from evermesh.checkpoint.tensors import Held, held_tensor, host_slices, local_tensors
from evermesh.parallelism.collectives import Communicator

_log = logging.getLogger(__name__)
_CALL_SITE = "checkpoint"
_LAST_PATIENCE_S = 10.0
"""With an object store, after a save has failed: it has been waited for already."""
_JSON_OBJECTS = TypeAdapter(dict[str, JsonValue])


def save(
    directory: Place | str,
    step: int,
    shard_map: ShardMap,
    tensors: Held,
    objects: Mapping[str, JsonValue],
    *,
    communicator: Communicator | None = None,
    keep: int | Retention | None = 2,
    description: Mapping[str, JsonValue] | None = None,
    parity: int | None = None,
) -> Place:
    """Write a checkpoint of ``step`` to ``directory`` and return its path when it is durable and ``latest`` names it.

    Collective: every rank of ``communicator`` calls it with the same arguments except ``tensors``, which are the
    rank's own regions (``shard_map.of_rank(rank)``), row-major, several of one tensor as a sequence. Ranks of the map
    are ranks of the communicator; ``directory`` is one place that all of them see, a path or the URL of an object
    store such as ``s3://BUCKET/PREFIX``; the communicator takes tensors on the host. ``keep`` newest checkpoints stay, or
    those that a policy keeps; None keeps all. A checkpoint of the same step is replaced atomically.
    With ``parity`` so many ranks protect each other: the files of any one of them can be made again (``repair``), for one
    part of parity more; in a file system only.
    A crash at any moment leaves the previous checkpoint or the new one.

    Raises:
        CheckpointNotSaved: on every rank, if any of them failed; earlier checkpoints are untouched.
        ParityUnusable: ``parity`` is no number of ranks, or ``directory`` is in an object store.
    """
    check_parity(parity, place_of(directory))
    communicator = communicator or Communicator()
    attempt = Attempt(place_of(directory), step, agreed_token(communicator))
    try:
        with LateFiles() as late:
            state = _State(attempt, shard_map, tensors, objects, description or {}, communicator, parity, late)
            _save(state)
    except RankFailure as failure:
        raise rolled_back(communicator, attempt, failure, shard_map.num_bytes) from failure
    if state.is_first:
        folder.retain(attempt.directory, step, as_retention(keep))
    return attempt.path


def agreed_token(communicator: Communicator) -> str:
    """A text that no other save has, equal on all ranks. Collective."""
    token = secrets.token_bytes(8) if communicator.rank == 0 else None
    return communicator.broadcast_bytes(token, 0, _CALL_SITE).hex()


def check_parity(width: int | None, directory: Place) -> None:
    """Raise ``ParityUnusable`` unless so many ranks can protect each other's files in ``directory``; None: none do."""
    if width is None:
        return
    if width < 1:
        raise ParityUnusable(
            f"parity is {width}, but a stripe has at least one rank. Give 1 or more, or None for no parity."
        )
    if isinstance(directory, ObjectPath):
        raise ParityUnusable(
            f"parity is {width}, but {directory} is in an object store, which keeps every object in several places "
            "itself. Give None for no parity, or save to a file system."
        )


@dataclass(frozen=True)
class _State:
    """The arguments of one save."""

    attempt: Attempt
    shard_map: ShardMap
    tensors: Held
    objects: Mapping[str, JsonValue]
    description: Mapping[str, JsonValue]
    communicator: Communicator
    parity: int | None
    late: LateFiles
    """What this rank has written."""

    @property
    def is_first(self) -> bool:
        return self.communicator.rank == 0

    @property
    def stripes(self) -> Stripes:
        assert self.parity is not None
        return Stripes(self.communicator.size, self.parity)

    def index(self, rank: int) -> Place:
        """Where that of a rank is written."""
        return self.attempt.files / index_name(rank)


def _save(state: _State) -> None:
    together(state.communicator, lambda: _prepare(state))
    together(state.communicator, lambda: _write_own_parts(state))
    if state.parity is not None:
        together(state.communicator, lambda: _write_parity(state))
    together(state.communicator, lambda: _make_durable(state))
    together(state.communicator, lambda: folder.commit(state.attempt) if state.is_first else None)


def _prepare(state: _State) -> None:
    """Refuse what cannot be saved before anything is written; rank 0 makes room for the attempt."""
    state.shard_map.check()
    state.shard_map.check_ranks(state.communicator.size)
    local_tensors(state.shard_map, state.communicator.rank, state.tensors)
    if state.is_first:
        for values in (state.objects, state.description):
            _JSON_OBJECTS.validate_python(dict(values))
        folder.prepare(state.attempt)


def _write_own_parts(state: _State) -> None:
    """Write this rank's data file, then the index of it; a rank that nothing was assigned to writes an empty index. Both
    are there for others to read, and not durable yet."""
    rank = state.communicator.rank
    planned = planned_parts(state.shard_map, rank)
    files: dict[str, tuple[int, str]] = {}
    header = safetensors_header([one.entry for one in planned])
    if planned:
        payloads = _payloads(header, planned, state.tensors)
        files[data_name(rank)] = state.late.write(state.attempt.files / data_name(rank), payloads)
    extents = extents_in_order(data_name(rank), len(header), map(placed_part, planned))
    told = told_of(
        state.shard_map.digest(),
        sum(one.entry.num_bytes for one in planned),
        sum(num_bytes for num_bytes, _ in files.values()),
    )
    state.late.write(state.index(rank), [index_payload(files, extents, told)])


def _payloads(header: bytes, planned: Sequence[PlannedPart], tensors: Held) -> Iterator[memoryview | bytes]:
    yield header
    for one in planned:
        yield from host_slices(held_tensor(tensors, one.part.name, one.part.held), one.part.start, one.part.stop)


def _make_durable(state: _State) -> None:
    """Sync what this rank has written; rank 0 writes the manifest meanwhile, as every index is there to be read."""
    state.late.begin_sync()
    if state.is_first:
        _write_manifest(state)
    state.late.sync()


def _write_manifest(state: _State) -> None:
    heads = read_index_heads(list(map(state.index, range(state.communicator.size))))
    values = {
        "step": state.attempt.step,
        "time_s": time.time(),
        "world_size": state.communicator.size,
        "description": dict(state.description),
        "objects": dict(state.objects),
    }
    manifest = merged_manifest(saved_map(state.shard_map), heads, values, _parity(state, heads))
    folder.stage(state.attempt, sealed(manifest), state.late)


def _write_parity(state: _State) -> None:
    """When every index is there."""
    stripes, rank = state.stripes, state.communicator.rank
    members = stripes.members(stripes.protected_by(rank))
    heads = read_index_heads(list(map(state.index, members)))
    protect(_folder(state), stripes, rank, dict(zip(members, heads, strict=True)))


def _parity(state: _State, heads: Sequence[IndexHead]) -> tuple[int, list[IndexHead]] | None:
    if state.parity is None:
        return None
    stripes, by_rank = state.stripes, dict(enumerate(heads))
    parts = [part for stripe in range(stripes.number) for part in parts_of(stripes, stripe, by_rank)]
    return stripes.width, read_index_heads([state.attempt.files / part.index_name for part in parts])


def _folder(state: _State) -> Path:
    assert isinstance(state.attempt.files, Path), "parity is for file systems"
    return state.attempt.files


def rolled_back(
    communicator: Communicator, attempt: Attempt, failure: RankFailure, bytes_needed: int
) -> CheckpointNotSaved:
    """Remove the traces of a save that failed on all ranks; what they raise. Collective."""
    payload = json.dumps(_roll_back(attempt)).encode() if communicator.rank == 0 else None
    bytes_free, newest = json.loads(communicator.broadcast_bytes(payload, 0, _CALL_SITE))
    return CheckpointNotSaved(
        attempt.directory, attempt.step, failure.rank, failure.cause, failure.errno, bytes_needed, bytes_free, newest
    )


def _roll_back(attempt: Attempt) -> tuple[int | None, str | None]:
    """Return the bytes that are then free, where that is known, and the name of the newest checkpoint."""
    if isinstance(attempt.directory, ObjectPath):
        patience_s = min(_LAST_PATIENCE_S, attempt.directory.patience_s)
        attempt = replace(attempt, directory=attempt.directory.with_patience(patience_s))
    try:
        folder.roll_back(attempt)
    except OSError as error:
        _log.warning("%s is left for the next save to remove: %s", attempt.files, error)
    try:
        newest = folder.named_by_latest(attempt.directory)
    except StoreUnusable:
        newest = None
    return _bytes_free(attempt.directory), newest


def _bytes_free(directory: Place) -> int | None:
    if isinstance(directory, ObjectPath):
        return None
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    status = os.statvfs(nearest)
    return status.f_bavail * status.f_frsize

"""Saving: every rank writes its part once, then one rename makes the checkpoint visible."""

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue, TypeAdapter

from evermesh.checkpoint import committing as folder
from evermesh.checkpoint.agreement import RankFailure, together
from evermesh.checkpoint.committing import Attempt, data_name, record_name
from evermesh.checkpoint.errors import CheckpointNotSaved, ShardMapInvalid, StoreUnusable
from evermesh.checkpoint.file_plan import PlannedPart, planned_parts
from evermesh.checkpoint.files import write_checksummed, write_durably
from evermesh.checkpoint.format import (
    MANIFEST,
    Extent,
    FilePart,
    Manifest,
    RankRecord,
    StoredFile,
    StoredTensor,
    safetensors_header,
)
from evermesh.checkpoint.retention import Retention, as_retention
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of
from evermesh.checkpoint.stores.store import store_of
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
) -> Place:
    """Write a checkpoint of ``step`` to ``directory`` and return its path when it is durable and ``latest`` names it.

    Collective: every rank of ``communicator`` calls it with the same arguments except ``tensors``, which are the
    rank's own regions (``shard_map.of_rank(rank)``), row-major, several of one tensor as a sequence. Ranks of the map
    are ranks of the communicator; ``directory`` is one place that all of them see, a path or the URL of an object
    store such as ``s3://BUCKET/PREFIX``; the communicator takes tensors on the host. ``keep`` newest checkpoints stay, or
    those that a policy keeps; None keeps all. A checkpoint of the same step is replaced atomically.
    A crash at any moment leaves the previous checkpoint or the new one.

    Raises:
        CheckpointNotSaved: on every rank, if any of them failed; earlier checkpoints are untouched.
    """
    communicator = communicator or Communicator()
    attempt = Attempt(place_of(directory), step, agreed_token(communicator))
    state = _State(attempt, shard_map, tensors, objects, description or {}, communicator)
    try:
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


@dataclass(frozen=True)
class _State:
    """The arguments of one save."""

    attempt: Attempt
    shard_map: ShardMap
    tensors: Held
    objects: Mapping[str, JsonValue]
    description: Mapping[str, JsonValue]
    communicator: Communicator

    @property
    def is_first(self) -> bool:
        return self.communicator.rank == 0


def _save(state: _State) -> None:
    together(state.communicator, lambda: _prepare(state))
    together(state.communicator, lambda: _write_own_parts(state))
    together(state.communicator, lambda: _write_manifest(state) if state.is_first else None)
    together(state.communicator, lambda: _commit(state) if state.is_first else None)


def _prepare(state: _State) -> None:
    """Refuse what cannot be saved before anything is written; rank 0 makes the temporary directory."""
    state.shard_map.check()
    highest = max((rank for t in state.shard_map.tensors.values() for s in t.shards for rank in s.ranks), default=0)
    if highest >= state.communicator.size:
        raise ShardMapInvalid(f"the shard map names rank {highest}, but {state.communicator.size} ranks save.")
    local_tensors(state.shard_map, state.communicator.rank, state.tensors)
    if state.is_first:
        for values in (state.objects, state.description):
            _JSON_OBJECTS.validate_python(dict(values))
        folder.prepare(state.attempt)


def _write_own_parts(state: _State) -> None:
    """Write this rank's data file and the record of it; ranks that nothing was assigned to write neither."""
    rank = state.communicator.rank
    planned = planned_parts(state.shard_map, rank)
    if not planned:
        return
    parts = [one.entry for one in planned]
    header = safetensors_header(parts)
    file = data_name(rank)
    num_bytes, checksums = write_checksummed(state.attempt.files / file, _payloads(header, planned, state.tensors))
    record = RankRecord(state.shard_map.digest(), StoredFile(num_bytes, checksums), _extents(file, len(header), parts))
    write_durably(state.attempt.records / record_name(rank), [record.to_json()])


def _payloads(header: bytes, planned: Sequence[PlannedPart], tensors: Held) -> Iterator[memoryview | bytes]:
    yield header
    for one in planned:
        yield from host_slices(held_tensor(tensors, one.part.name, one.held), one.part.start, one.part.stop)


def _extents(file: str, offset: int, parts: list[FilePart]) -> dict[str, tuple[Extent, ...]]:
    extents: dict[str, list[Extent]] = {}
    for part in parts:
        extents.setdefault(part.name, []).append(Extent(file, offset, part.region, part.start, part.stop))
        offset += part.num_bytes
    return {name: tuple(of_tensor) for name, of_tensor in extents.items()}


def _write_manifest(state: _State) -> None:
    """Merge the records of all ranks into the manifest. On rank 0, when every record is on the disk."""
    records = {rank: state.attempt.records / record_name(rank) for rank in state.shard_map.writers()}
    found = {rank: RankRecord.from_json(store_of(path).read(path)) for rank, path in records.items()}
    digest = state.shard_map.digest()
    others = [rank for rank, record in found.items() if record.digest != digest]
    if others:
        raise ShardMapInvalid(f"ranks {others} saved another shard map than rank 0. Build it from the same inputs.")
    manifest = _manifest(state, found)
    for name in manifest.tensors:
        manifest.check_cover(name)
    write_durably(state.attempt.files / MANIFEST, [manifest.to_json()])


def _commit(state: _State) -> None:
    folder.commit(state.attempt, map(record_name, state.shard_map.writers()))


def _manifest(state: _State, records: Mapping[int, RankRecord]) -> Manifest:
    tensors = {}
    for name, tensor in state.shard_map.tensors.items():
        extents = tuple(extent for record in records.values() for extent in record.extents.get(name, ()))
        tensors[name] = StoredTensor(tensor.dtype, tensor.shape, extents, tensor.permutation, tensor.padding)
    return Manifest(
        step=state.attempt.step,
        time_s=time.time(),
        world_size=state.communicator.size,
        description=dict(state.description),
        objects=dict(state.objects),
        tensors=tensors,
        files={data_name(rank): record.file for rank, record in records.items()},
    )


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

"""Saving: every rank writes its part once, then one rename makes the checkpoint visible."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from evermesh.checkpoint import committing as folder
from evermesh.checkpoint.agreement import RankFailure, on_first, together
from evermesh.checkpoint.committing import data_name, index_name
from evermesh.checkpoint.encoding import MANIFEST, IndexHead, extents_in_order, index_payload, read_index_head, sealed
from evermesh.checkpoint.errors import CheckpointNotSaved
from evermesh.checkpoint.file_plan import PlannedPart, placed_part, planned_parts, saved_map
from evermesh.checkpoint.files import write_checksummed, write_durably
from evermesh.checkpoint.format import safetensors_header
from evermesh.checkpoint.merging import merged_manifest, told_of
from evermesh.checkpoint.parity import Stripes, check_width, parts_of, protect
from evermesh.checkpoint.retention import Retention, as_retention
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.tensors import Held, held_tensor, host_slices, local_tensors
from evermesh.parallelism.collectives import Communicator

_log = logging.getLogger(__name__)
_JSON_OBJECTS = TypeAdapter(dict[str, JsonValue])


def save(
    directory: Path | str,
    step: int,
    shard_map: ShardMap,
    tensors: Held,
    objects: Mapping[str, JsonValue],
    *,
    communicator: Communicator | None = None,
    keep: int | Retention | None = 2,
    description: Mapping[str, JsonValue] | None = None,
    parity: int | None = None,
) -> Path:
    """Write a checkpoint of ``step`` to ``directory`` and return its path when it is durable and ``latest`` names it.

    Collective: every rank of ``communicator`` calls it with the same arguments except ``tensors``, which are the
    rank's own regions (``shard_map.of_rank(rank)``), row-major, several of one tensor as a sequence. Ranks of the map
    are ranks of the communicator; ``directory`` is one place that all of them see; the communicator takes tensors on
    the host. ``keep`` newest checkpoints stay, or those that a policy keeps; None keeps all. A checkpoint of the same
    step is replaced atomically. With ``parity`` so many ranks protect each other: the files of any one of them can be made
    again (``repair``), for one part of parity more.
    A crash at any moment leaves the previous checkpoint or the new one.

    Raises:
        CheckpointNotSaved: on every rank, if any of them failed; earlier checkpoints are untouched.
    """
    check_width(parity)
    state = _State(
        Path(directory), step, shard_map, tensors, objects, description or {}, communicator or Communicator(), parity
    )
    try:
        path = _save(state)
    except RankFailure as failure:
        raise rolled_back(state.communicator, state.directory, step, failure, shard_map.num_bytes) from failure
    if state.is_first:
        folder.retain(state.directory, step, as_retention(keep))
    return path


@dataclass(frozen=True)
class _State:
    """The arguments of one save."""

    directory: Path
    step: int
    shard_map: ShardMap
    tensors: Held
    objects: Mapping[str, JsonValue]
    description: Mapping[str, JsonValue]
    communicator: Communicator
    parity: int | None

    @property
    def is_first(self) -> bool:
        return self.communicator.rank == 0

    @property
    def stripes(self) -> Stripes:
        assert self.parity is not None
        return Stripes(self.communicator.size, self.parity)

    @property
    def temporary(self) -> Path:
        return folder.temporary_path(self.directory, self.step)


def _save(state: _State) -> Path:
    together(state.communicator, lambda: _prepare(state))
    together(state.communicator, lambda: _write_own_parts(state))
    if state.parity is not None:
        together(state.communicator, lambda: _write_parity(state))
    together(state.communicator, lambda: _write_manifest(state) if state.is_first else None)
    together(state.communicator, lambda: folder.commit(state.directory, state.step) if state.is_first else None)
    return state.directory / folder.step_name(state.step)


def _prepare(state: _State) -> None:
    """Refuse what cannot be saved before anything is written; rank 0 makes the temporary directory."""
    state.shard_map.check()
    state.shard_map.check_ranks(state.communicator.size)
    local_tensors(state.shard_map, state.communicator.rank, state.tensors)
    if state.is_first:
        for values in (state.objects, state.description):
            _JSON_OBJECTS.validate_python(dict(values))
        folder.prepare(state.directory, state.step)


def _write_own_parts(state: _State) -> None:
    """Write this rank's data file, then the index of it; a rank that nothing was assigned to writes an empty index."""
    rank = state.communicator.rank
    planned = planned_parts(state.shard_map, rank)
    files: dict[str, tuple[int, str]] = {}
    header = safetensors_header([one.entry for one in planned])
    if planned:
        payloads = _payloads(header, planned, state.tensors)
        files[data_name(rank)] = write_checksummed(state.temporary / data_name(rank), payloads)
    extents = extents_in_order(data_name(rank), len(header), map(placed_part, planned))
    told = told_of(
        state.shard_map.digest(),
        sum(one.entry.num_bytes for one in planned),
        sum(num_bytes for num_bytes, _ in files.values()),
    )
    write_durably(state.temporary / index_name(rank), [index_payload(files, extents, told)])


def _payloads(header: bytes, planned: Sequence[PlannedPart], tensors: Held) -> Iterator[memoryview | bytes]:
    yield header
    for one in planned:
        yield from host_slices(held_tensor(tensors, one.part.name, one.part.held), one.part.start, one.part.stop)


def _write_manifest(state: _State) -> None:
    """On rank 0, when every index is on the disk."""
    heads = [read_index_head(state.temporary / index_name(rank)) for rank in range(state.communicator.size)]
    values = {
        "step": state.step,
        "time_s": time.time(),
        "world_size": state.communicator.size,
        "description": dict(state.description),
        "objects": dict(state.objects),
    }
    manifest = merged_manifest(saved_map(state.shard_map), heads, values, _parity(state, heads))
    write_durably(state.temporary / MANIFEST, [sealed(manifest)])


def _write_parity(state: _State) -> None:
    """When every index is on the disk."""
    stripes, rank = state.stripes, state.communicator.rank
    members = stripes.members(stripes.protected_by(rank))
    protect(state.temporary, stripes, rank, {at: read_index_head(state.temporary / index_name(at)) for at in members})


def _parity(state: _State, heads: Sequence[IndexHead]) -> tuple[int, list[IndexHead]] | None:
    if state.parity is None:
        return None
    stripes, by_rank = state.stripes, dict(enumerate(heads))
    parts = [part for stripe in range(stripes.number) for part in parts_of(stripes, stripe, by_rank)]
    return stripes.width, [read_index_head(state.temporary / part.index_name) for part in parts]


def rolled_back(
    communicator: Communicator, directory: Path, step: int, failure: RankFailure, bytes_needed: int
) -> CheckpointNotSaved:
    """Remove the traces of a save that failed on all ranks; what they raise. Collective."""
    bytes_free = on_first(communicator, lambda: _roll_back(directory, step))
    return CheckpointNotSaved(directory, step, failure.rank, failure.cause, failure.errno, bytes_needed, bytes_free)


def _roll_back(directory: Path, step: int) -> int:
    """Return the bytes that are then free."""
    try:
        folder.roll_back(directory, step)
    except OSError as error:
        left = folder.temporary_path(directory, step)
        _log.warning("%s is left for the next save to remove: %s", left, error)
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    status = os.statvfs(nearest)
    return status.f_bavail * status.f_frsize

"""Finds ranks whose copy of parameters is no longer that of the others: hashes of all bytes, compared in one small sum."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from evermesh.parallelism.collectives import Communicator
from evermesh.runtime.parameter_set import ParameterSet, within

_KINDS = 4
"""Hashes of a rank: what it shares with its owners, and what sharers hold alike, of the model and of its experts."""
_CHUNK_BYTES = 1 << 26
"""What is copied from a device at once."""


class Replica(NamedTuple):
    """Parameters that other ranks hold too, by their hash."""

    name: str
    """The same on all ranks that hold a copy, and on no other."""
    digest: int


class Disagreement(NamedTuple):
    """Copies that are not alike."""

    name: str
    suspects: tuple[int, ...]
    """The ranks whose copy few others have; all holders, if no copy has a majority."""
    holders: tuple[int, ...]


def replicas_of(sets: Sequence[ParameterSet], stage: int) -> list[Replica]:
    """What this rank holds, by who else does; ``stage`` is its rank in the pipeline. Reads every byte of it once.

    What owners hold alike is the part of the values that a rank keeps; of that, sharers hold the replicated stretch alike.
    """
    hashes: defaultdict[str, xxhash.xxh3_64] = defaultdict(xxhash.xxh3_64)
    for parameters in sets:
        division, owner = parameters.owners.division, parameters.owners.rank
        kind = "model" if parameters.sharers.parts is None else "experts"
        side = f"{kind} of stage {stage}, part {division.parameter_part(owner)}"
        held = parameters.flat.parameter_part(owner)
        alike = within(parameters.flat.replicated, held)
        _add(hashes[f"{side} of sharer {parameters.sharers.number}"], parameters.kept_values)
        if alike.stop > alike.start and parameters.sharers.all.size > 1:
            _add(hashes[f"{side}, alike"], parameters.kept_values[alike])
    return [Replica(name, found.intdigest()) for name, found in hashes.items()]


def disagreements(own: Sequence[Replica], world: Communicator, device: torch.device) -> list[Disagreement]:
    """The replicas of all ranks that are not alike; the same on every rank. Collective: one sum of 64 bytes per rank."""
    assert len(own) <= _KINDS, own
    table = torch.zeros(world.size, _KINDS, 2, dtype=torch.int64, device=device)
    for kind, replica in enumerate(own):
        name = xxhash.xxh3_64_intdigest(replica.name.encode())
        table[world.rank, kind] = torch.tensor([_signed(name | 1), _signed(replica.digest)])
    world.all_reduce(table, "replicas")
    holders: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for rank, rows in enumerate(table.tolist()):
        for name, digest in rows:
            if name:
                holders[name][rank] = digest
    names = {_signed(xxhash.xxh3_64_intdigest(replica.name.encode()) | 1): replica.name for replica in own}
    return list(_differing(holders.items(), names))


def _differing(found: Iterable[tuple[int, dict[int, int]]], names: dict[int, str]) -> Iterator[Disagreement]:
    for name, digests in found:
        counts = Counter(digests.values())
        if len(counts) == 1:
            continue
        commonest, number = counts.most_common(1)[0]
        has_majority = 2 * number > len(digests)
        suspects = tuple(rank for rank, digest in digests.items() if not has_majority or digest != commonest)
        yield Disagreement(names.get(name, "parameters of another stage"), suspects, tuple(digests))


def _add(digest: xxhash.xxh3_64, values: Tensor) -> None:
    raw = values.detach().view(torch.uint8)
    for chunk in raw.split(_CHUNK_BYTES):
        digest.update(chunk.cpu().numpy().data)


def _signed(value: int) -> int:
    """The same 64 bits as torch's int64 has them."""
    return value - (1 << 64) if value >= 1 << 63 else value


__all__ = ["Disagreement", "Replica", "disagreements", "replicas_of"]

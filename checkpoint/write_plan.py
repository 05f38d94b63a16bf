"""Who writes what: every element once. Replicas are divided among their holders.

Of what rules say, a rank computes its own part alone, and a reader who wrote a region, both by arithmetic. Shards that are
listed one by one are divided at once, for all ranks.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from evermesh.checkpoint.balance import quotas
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.locating import Sought, holders_near
from evermesh.checkpoint.regions import Region, StoredForm, are_apart
from evermesh.checkpoint.rules import Held, ShardingRule
from evermesh.checkpoint.shard_map import ShardMap, TensorShards

LEAST_PART_BYTES = 1 << 16
"""What several ranks hold is divided among so many of them that each writes at least this much."""


@dataclass(frozen=True, slots=True)
class WritePart:
    """What one rank writes of one region that it holds."""

    name: str
    """Name of the tensor."""
    held: int
    """Which of the regions that the rank holds of the tensor."""
    region: Region
    start: int
    """First element of the region's row-major storage."""
    stop: int


class _Slot(NamedTuple):
    """Where a tensor lies when all tensors that the same axes hold copies of are laid end to end. Bytes."""

    begin: int
    total: int
    """Of all of them."""


@dataclass(frozen=True)
class WritePlan:
    """The division of the writing of a map. Equal on every rank."""

    shard_map: ShardMap
    least_part_bytes: int = LEAST_PART_BYTES

    def of_rank(self, rank: int) -> tuple[WritePart, ...]:
        """What ``rank`` writes; nothing empty."""
        parts = list(self._listed.get(rank, ()))
        for name, tensor in self._ruled.items():
            parts += self._of_rule(name, tensor, rank)
        return tuple(parts)

    def writers_near(self, name: str, region: Region, form: StoredForm) -> Iterator[int]:
        """Ranks that may have written elements of a region, which is given in ``form``; perhaps some that have not."""
        tensor = self.shard_map.tensors[name]
        rule = tensor.placement
        if not isinstance(rule, ShardingRule):
            for rank, written in self._writers_listed.get(name, ()):
                if form != tensor.form or not are_apart(written, region):
                    yield rank
            return
        for coordinates, start, stop in holders_near(rule, tensor.form, Sought.of(region, form, tensor.form)):
            held = rule.held(tensor.form, coordinates)
            for copy in self._copies(name, tensor, rule, held, max(start, held.start), min(stop, held.stop)):
                yield rule.grid.rank(rule.placed(coordinates, rule.copy_axes, copy))

    def _of_rule(self, name: str, tensor: TensorShards, rank: int) -> Iterator[WritePart]:
        rule = tensor.placement
        assert isinstance(rule, ShardingRule)
        coordinates = rule.grid.coordinates(rank)
        if coordinates is None:
            return
        held = rule.held(tensor.form, coordinates)
        start, stop = self._own_part(name, tensor, rule, held, rule.copy(coordinates))
        if start >= stop:
            return
        begin = held.start
        for index, region in enumerate(rule.regions(tensor.form, coordinates)):
            end = begin + region.num_elements
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield WritePart(name, index, region, first - begin, last - begin)
            begin = end

    def _own_part(self, name: str, tensor: TensorShards, rule: ShardingRule, held: Held, copy: int) -> tuple[int, int]:
        """[start, stop) of the storage of the box that the holder of a copy writes."""
        if rule.num_copies == 1:
            return held.start, held.stop
        base, total, num_writers = self._shared(name, tensor, rule, held)
        if copy >= num_writers:
            return 0, 0
        item = DTYPES[tensor.dtype].num_bytes
        edges = ((total * at // num_writers - base) // item for at in (copy, copy + 1))
        start, stop = (min(max(edge, held.start), held.stop) for edge in edges)
        return start, stop

    def _copies(self, name: str, tensor: TensorShards, rule: ShardingRule, held: Held, start: int, stop: int) -> range:
        """The copies whose holders may write elements [start, stop) of the storage of the box."""
        if start >= stop:
            return range(0)
        if rule.num_copies == 1:
            return range(1)
        base, total, num_writers = self._shared(name, tensor, rule, held)
        item = DTYPES[tensor.dtype].num_bytes
        first, last = ((base + edge * item) * num_writers // max(total, 1) for edge in (start, stop))
        return range(min(max(first - 1, 0), num_writers - 1), min(last + 2, num_writers))

    def _shared(self, name: str, tensor: TensorShards, rule: ShardingRule, held: Held) -> tuple[int, int, int]:
        """What the holders of copies divide, in bytes: where the storage of the box begins in it, how long it is, and
        among how many it is divided."""
        item = DTYPES[tensor.dtype].num_bytes
        if rule.flat is not None:
            base, total = held.buffer * item, rule.flat.length * item
        else:
            base, total = self._slots[name]
        return base, total, max(1, min(rule.num_copies, total // self.least_part_bytes))

    @cached_property
    def _ruled(self) -> Mapping[str, TensorShards]:
        tensors = self.shard_map.tensors.items()
        return {name: tensor for name, tensor in tensors if isinstance(tensor.placement, ShardingRule)}

    @cached_property
    def _slots(self) -> Mapping[str, _Slot]:
        """Of every tensor with copies that is not cut flat: as long as its largest part."""
        begins: dict[str, tuple[object, int]] = {}
        totals: dict[object, int] = {}
        for name, tensor in sorted(self._ruled.items()):
            rule = tensor.placement
            assert isinstance(rule, ShardingRule)
            if rule.flat is None and rule.num_copies > 1:
                alike = (rule.grid, rule.copy_axes)
                begins[name] = (alike, totals.get(alike, 0))
                totals[alike] = begins[name][1] + rule.largest(tensor.form) * DTYPES[tensor.dtype].num_bytes
        return {name: _Slot(begin, totals[alike]) for name, (alike, begin) in begins.items()}

    @cached_property
    def _writers_listed(self) -> Mapping[str, list[tuple[int, Region]]]:
        """By tensor: who writes of which region."""
        writers: dict[str, list[tuple[int, Region]]] = {}
        for rank, parts in self._listed.items():
            for part in parts:
                writers.setdefault(part.name, []).append((rank, part.region))
        return writers

    @cached_property
    def _listed(self) -> Mapping[int, tuple[WritePart, ...]]:
        """Of the shards that are listed: the bytes of the busiest rank are as few as its replicas allow.

        Regions that the same ranks hold are laid end to end and cut once per rank, so that a rank writes few parts. Groups
        with fewer holders are divided first.
        """
        groups = self._groups()
        loads: dict[int, int] = {rank: 0 for ranks in groups for rank in ranks}
        parts: dict[int, list[WritePart]] = {rank: [] for rank in sorted(loads)}
        for ranks, shards in sorted(groups.items(), key=lambda group: (len(group[0]), group[0])):
            num_bytes = sum(shard.region.num_elements * shard.item for shard in shards)
            shares = quotas([loads[rank] for rank in ranks], num_bytes, self.least_part_bytes)
            for rank, share in zip(ranks, shares, strict=True):
                loads[rank] += share
            for at, shard, start, stop in _cut(shards, shares):
                parts[ranks[at]].append(WritePart(shard.name, shard.held[ranks[at]], shard.region, start, stop))
        return {rank: tuple(of_rank) for rank, of_rank in parts.items() if of_rank}

    def _groups(self) -> dict[tuple[int, ...], list["_Listed"]]:
        """By holders: every listed shard that is not empty, ordered by name."""
        groups: dict[tuple[int, ...], list[_Listed]] = {}
        for name, tensor in sorted(self.shard_map.tensors.items()):
            if isinstance(tensor.placement, ShardingRule):
                continue
            counts: dict[int, int] = {}
            for shard in tensor.placement:
                held = {rank: counts.get(rank, 0) for rank in shard.ranks}
                counts |= {rank: count + 1 for rank, count in held.items()}
                if shard.region.num_elements:
                    entry = _Listed(name, shard.region, DTYPES[tensor.dtype].num_bytes, held)
                    groups.setdefault(tuple(sorted(shard.ranks)), []).append(entry)
        return groups


class _Listed(NamedTuple):
    """A shard that is listed."""

    name: str
    region: Region
    item: int
    """Bytes of one element."""
    held: Mapping[int, int]
    """By holder: which of the regions that it holds of the tensor."""


def _cut(shards: Sequence[_Listed], shares: Sequence[int]) -> Iterator[tuple[int, _Listed, int, int]]:
    """Cut shards laid end to end at the sums of ``shares`` (bytes), rounded down to whole elements."""
    ends = list(itertools.accumulate(shares))
    last = max(at for at, share in enumerate(shares) if share)
    begin, at = 0, 0
    for shard in shards:
        start, num_elements = 0, shard.region.num_elements
        while start < num_elements:
            stop = num_elements if at == last else min(num_elements, (ends[at] - begin) // shard.item)
            if stop > start:
                yield at, shard, start, stop
                start = stop
            if start < num_elements:
                at += 1
        begin += num_elements * shard.item

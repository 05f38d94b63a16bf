"""The snapshots in the memory of all nodes of a job, as one rank reaches them: its own node's directly, others' by TCP."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from evermesh.checkpoint.errors import CheckpointCorrupt, ShardMapInvalid
from evermesh.checkpoint.rules import ShardingRule
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.sources import Source
from evermesh.fault.snapshot.choosing import Version, complete_versions
from evermesh.fault.snapshot.handshake import Address
from evermesh.fault.snapshot.keeper.area import identity_in
from evermesh.fault.snapshot.keeper.layouts import Group, layout_file, opened_layout
from evermesh.fault.snapshot.keeper.serving import address_in, inventory_of
from evermesh.fault.snapshot.keeper.slots import Held, Record
from evermesh.fault.snapshot.parts import LocalPart, Part, RemotePart, version_of
from evermesh.fault.snapshot.remote import Keepers, KeeperUnreachable, RemoteKeeper
from evermesh.fault.snapshot.source import source_of_parts

_ASKED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Kept:
    """What one keeper holds, or has left."""

    nonce: str
    """By which a rank knows the keeper of its own node."""
    address: Address | None
    """None: only its own node reaches it."""
    parts: tuple[Held, ...]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, told: Mapping[str, Any], address: Address | None) -> Self:
        """From an inventory. Raises ``ValueError``, ``LookupError`` or ``TypeError`` if it is none."""
        parts = tuple(Held(number, state, Record(*record)) for number, state, record in told["parts"])
        return cls(str(told["nonce"]), address, parts, tuple(map(Group.from_values, told["groups"])))

    def values(self) -> dict[str, Any]:
        """As JSON has it; ``of`` and the address make it again."""
        return {"nonce": self.nonce, "parts": self.parts, "groups": self.groups, "address": self.address}


def to_json(kept: Iterable[Kept]) -> bytes:
    """What one rank has found, for the others."""
    return json.dumps([one.values() for one in kept], separators=(",", ":")).encode()


def from_json(payload: bytes) -> list[Kept]:
    """What ``to_json`` was given."""
    return [Kept.of(told, Address(*told["address"]) if told["address"] else None) for told in json.loads(payload)]


class Memories:
    """The memory of the nodes of a job; not collective. A context manager.

    Args:
        area: of the keeper of this node; None: this process is on no node of the job.
        keepers: those that may be reached; None: there is no other node.
        reader: spreads whom this rank asks for what several hold.
    """

    def __init__(self, area: Path | None, keepers: Keepers | None, reader: int = 0) -> None:
        self._area, self._keepers, self._reader = area, keepers, reader
        self._remote: dict[Address, RemoteKeeper] = {}
        found = identity_in(area) if area is not None else None
        self._own = found.nonce if found is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for keeper in self._remote.values():
            keeper.close()

    @property
    def bytes_received(self) -> int:
        """Of data files, from other nodes."""
        return sum(keeper.bytes_received for keeper in self._remote.values())

    def look(self) -> tuple[list[Kept], list[str]]:
        """What all keepers hold that can be reached now, and why others cannot; waits for seconds at most."""
        own = address_in(self._area) if self._area is not None else None
        found = [Kept.of(inventory_of(self._area), own)] if self._area is not None and self._own is not None else []
        others = [one for one in (self._keepers.addresses if self._keepers else ()) if one != own]
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            told = list(pool.map(self._inventory, others))
        kept = {one.nonce: one for one in told if isinstance(one, Kept)} | {one.nonce: one for one in found}
        return list(kept.values()), [one for one in told if isinstance(one, str)]

    def complete(self, kept: Sequence[Kept]) -> list[Version]:
        """The snapshots that ``kept`` has all of, newest first. Where ranks are missing, maps are read."""
        held: dict[Version, set[int]] = {}
        for one in kept:
            for part in one.parts:
                held.setdefault(version_of(part.record), set()).add(part.record.rank)

        def is_all(version: Version, ranks: Collection[int]) -> bool:
            try:
                return covers(self.layout(kept, version)[0], ranks)
            except CheckpointCorrupt:
                return False

        return complete_versions(held, [group for one in kept for group in one.groups], is_all)

    def layout(self, kept: Sequence[Kept], version: Version) -> tuple[ShardMap, int]:
        """The map by which a snapshot was made, and how many ranks made it. Raises ``CheckpointCorrupt``."""
        fact = "nobody who is there has its shard map"
        for one in sorted(kept, key=lambda one: one.nonce != self._own):
            for group in one.groups:
                if _is_of(group, version):
                    try:
                        _, world_size, content = opened_layout(self._layout(one, version, group.ranks[0]))
                        shard_map = ShardMap.from_json(content)
                        shard_map.check()
                        if shard_map.digest() == version.shard_map:
                            return shard_map, world_size
                        fact = "its shard map is another one"
                    except (OSError, ValueError, LookupError, ShardMapInvalid) as error:
                        fact = f"its shard map cannot be read: {error}"
        raise CheckpointCorrupt(_place(version), fact)

    def source(self, kept: Sequence[Kept], version: Version) -> Source:
        """A snapshot for ``load``, from the memory of whoever holds it. Raises ``CheckpointCorrupt``."""
        shard_map, world_size = self.layout(kept, version)
        parts: dict[int, Part] = {}
        for one in sorted(kept, key=lambda one: one.nonce != self._own):
            for held in one.parts:
                if version_of(held.record) == version and held.record.rank not in parts:
                    part = self._part(one, held)
                    parts |= {held.record.rank: part} if part is not None else {}
        if not parts:
            raise CheckpointCorrupt(_place(version), "no part of it can be reached from here")
        groups = {group.ranks for one in kept for group in one.groups if _is_of(group, version)}
        return source_of_parts(parts, sorted(groups), version, shard_map, world_size, self._reader)

    def _inventory(self, address: Address) -> Kept | str:
        try:
            return Kept.of(self._keeper(address).inventory(), address)
        except KeeperUnreachable as error:
            return str(error)
        except (ValueError, LookupError, TypeError) as error:
            return f"the keeper at {address} says what cannot be understood: {error}"

    def _part(self, kept: Kept, held: Held) -> Part | None:
        if self._area is not None and kept.nonce == self._own:
            return LocalPart(self._area, held)
        return RemotePart(self._keeper(kept.address), held) if kept.address is not None and self._keepers else None

    def _layout(self, kept: Kept, version: Version, first_rank: int) -> bytes:
        if self._area is not None and kept.nonce == self._own:
            return layout_file(self._area, version.generation, version.shard_map, first_rank).read_bytes()
        if kept.address is None or self._keepers is None:
            raise KeeperUnreachable("only its own node reaches it")
        return self._keeper(kept.address).read_all({"what": "layout", "rank": first_rank, "version": version})

    def _keeper(self, address: Address) -> RemoteKeeper:
        assert self._keepers is not None
        if address not in self._remote:
            self._remote[address] = RemoteKeeper(address, self._keepers.launch, self._keepers.secret)
        return self._remote[address]


def covers(shard_map: ShardMap, ranks: Collection[int]) -> bool:
    """Whether ``ranks`` hold everything, because of what the others hold they have copies."""
    there, known = frozenset(ranks), dict[object, bool]()
    for tensor in shard_map.tensors.values():
        rule = tensor.placement
        if not isinstance(rule, ShardingRule):
            if any(there.isdisjoint(shard.ranks) for shard in rule if shard.region.num_elements):
                return False
            continue
        alike = (rule.grid, rule.copy_axes)
        if alike not in known:
            known[alike] = _all_places(rule, there)
        if not known[alike]:
            return False
    return True


def _all_places(rule: ShardingRule, ranks: Collection[int]) -> bool:
    """Whether there is one of ``ranks`` for every place along the axes that cut."""
    found = {
        tuple(0 if axis in rule.copy_axes else at for axis, at in enumerate(coordinates))
        for rank in ranks
        if (coordinates := rule.grid.coordinates(rank)) is not None
    }
    return len(found) * rule.num_copies == math.prod(size for size, _ in rule.grid.axes)


def _is_of(group: Group, version: Version) -> bool:
    return (group.generation, group.shard_map) == (version.generation, version.shard_map)


def _place(version: Version) -> Path:
    return Path(f"snapshot of step {version.step}")

"""The registry of everything that must survive a restart, each entry with its rule for a change of world size.

Tensors go through the shard map; everything else (random number generators by logical stream, the data cursor, queues,
hyper-parameters) is an object: a JSON value behind ``get`` and ``set``. Nothing is saved that was not registered, and
nothing registered is silently left out or left alone.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from evermesh.checkpoint.errors import RegistryMismatch
from evermesh.checkpoint.regions import STRICT
from evermesh.checkpoint.shard_map import ShardMap, TensorShards
from evermesh.parallelism.collectives import Communicator

if TYPE_CHECKING:
    import torch

_CALL_SITE = "state registry"


@dataclass(frozen=True, slots=True)
class Replicated:
    """The same value on every rank, such as a random stream or the data cursor: restored on any number of ranks."""

    __pydantic_config__ = STRICT

    kind: Literal["replicated"] = "replicated"


@dataclass(frozen=True, slots=True)
class Sharded:
    """A tensor that a shard map describes: any regions of it can be restored anywhere."""

    __pydantic_config__ = STRICT

    kind: Literal["sharded"] = "sharded"


@dataclass(frozen=True, slots=True)
class PerRank:
    """A value of each rank's own, restored on the same rank if the number of ranks is the same."""

    __pydantic_config__ = STRICT

    on_change: Literal["drop", "sum", "refuse"]
    """With another number of ranks: ``drop`` leaves the new ranks as they are; ``sum`` gives rank 0 the sum of all
    numbers and the others zero, so that the total stays; ``refuse`` is an error."""
    kind: Literal["per-rank"] = "per-rank"


Rule: TypeAlias = Annotated[Replicated | Sharded | PerRank, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class StateDescription:
    """The names and rules of a registry. Serialised as JSON (``to_json``/``from_json``)."""

    __pydantic_config__ = STRICT

    entries: dict[str, Rule]

    def to_json(self) -> bytes:
        """The description as JSON."""
        return _adapter().dump_json(self)

    @classmethod
    def from_json(cls, payload: bytes | str) -> Self:
        """The description that ``to_json`` wrote. Raises ``RegistryMismatch`` if it is none."""
        try:
            return _adapter().validate_json(payload)
        except ValidationError as error:
            raise RegistryMismatch(f"not a description of state: {error.errors()[0]}. Save again.") from error


@dataclass(frozen=True, slots=True)
class _Object:
    rule: Replicated | PerRank
    get: Callable[[], JsonValue]
    set: Callable[[JsonValue], None]


class StateRegistry:
    """Everything that must survive. ``shard_map``, ``tensors`` and ``objects()`` are what ``save`` takes, ``restore``
    takes back what ``load`` returns."""

    def __init__(self) -> None:
        self._shards: dict[str, TensorShards] = {}
        self._tensors: dict[str, torch.Tensor | Sequence[torch.Tensor]] = {}
        self._objects: dict[str, _Object] = {}

    def register_tensor(
        self, name: str, shards: TensorShards, held: "torch.Tensor | Sequence[torch.Tensor] | None" = None
    ) -> None:
        """Add a logical tensor; ``held`` is this rank's storage of its regions, None if it holds none."""
        self._refuse_twice(name)
        self._shards[name] = shards
        if held is not None:
            self._tensors[name] = held

    def register(
        self, name: str, rule: Replicated | PerRank, get: Callable[[], JsonValue], set_: Callable[[JsonValue], None]
    ) -> None:
        """Add an object: ``get`` returns its value now, ``set_`` takes the value that a checkpoint holds."""
        self._refuse_twice(name)
        self._objects[name] = _Object(rule, get, set_)

    @property
    def shard_map(self) -> ShardMap:
        """The map of all registered tensors."""
        return ShardMap(dict(self._shards))

    @property
    def tensors(self) -> "Mapping[str, torch.Tensor | Sequence[torch.Tensor]]":
        """This rank's storage of the registered tensors."""
        return dict(self._tensors)

    @property
    def description(self) -> StateDescription:
        """Names and rules of all entries."""
        rules: dict[str, Rule] = {name: Sharded() for name in self._shards}
        return StateDescription(rules | {name: entry.rule for name, entry in self._objects.items()})

    def objects(self, communicator: Communicator | None = None) -> dict[str, JsonValue]:
        """All objects as they are now, with their rules: equal on every rank.

        Collective over ``communicator`` (None: one process), which takes tensors on the host.
        """
        own: dict[str, JsonValue] = {
            name: entry.get() for name, entry in self._objects.items() if isinstance(entry.rule, PerRank)
        }
        of_ranks = _gather(own, communicator or Communicator()) if own else []
        return {name: self._saved(name, entry, of_ranks) for name, entry in self._objects.items()}

    def restore(self, objects: Mapping[str, JsonValue], rank: int = 0, world_size: int = 1) -> None:
        """Give every registered object the value it has in ``objects``, for one of ``world_size`` ranks.

        Not collective. Everything is checked before the first ``set_``.

        Raises:
            RegistryMismatch: entries are missing, unknown, have another rule, or refuse the change of world size.
        """
        saved = {name: _parse(name, value) for name, value in objects.items()}
        problems = self._problems(saved, world_size)
        if problems:
            raise RegistryMismatch(
                f"the checkpoint does not fit the state registry: {'; '.join(problems)}. Register what was saved, with "
                f"the same rules, or load a checkpoint of this version of the job."
            )
        for name, entry in self._objects.items():
            if isinstance(entry.rule, Replicated):
                entry.set(saved[name].value)
            else:
                _restore_per_rank(entry, saved[name].value, rank, world_size)

    def _saved(self, name: str, entry: _Object, of_ranks: list[dict[str, JsonValue]]) -> JsonValue:
        value = [values[name] for values in of_ranks] if isinstance(entry.rule, PerRank) else entry.get()
        return {"rule": _rule_adapter().dump_python(entry.rule, mode="json"), "value": value}

    def _problems(self, saved: "Mapping[str, _Saved]", world_size: int) -> list[str]:
        problems = [f"{name} is not in the checkpoint" for name in sorted(self._objects.keys() - saved.keys())]
        problems += [f"{name} is not registered" for name in sorted(saved.keys() - self._objects.keys())]
        for name in sorted(self._objects.keys() & saved.keys()):
            rule, value = self._objects[name].rule, saved[name].value
            if saved[name].rule != rule:
                problems.append(f"{name} was saved as {saved[name].rule} and is registered as {rule}")
            elif isinstance(rule, PerRank):
                assert isinstance(value, list)
                if rule.on_change == "refuse" and len(value) != world_size:
                    problems.append(f"{name} refuses to go from {len(value)} to {world_size} ranks")
        return problems

    def _refuse_twice(self, name: str) -> None:
        if name in self._shards or name in self._objects:
            raise RegistryMismatch(f"{name} is registered twice. Give every entry a name of its own.")


@dataclass(frozen=True, slots=True)
class _Saved:
    """An object in a checkpoint."""

    __pydantic_config__ = STRICT

    rule: Rule
    value: JsonValue


def _parse(name: str, value: JsonValue) -> _Saved:
    try:
        saved: _Saved = _saved_adapter().validate_python(value)
    except ValidationError as error:
        raise RegistryMismatch(f"{name} was not saved by a registry. Register it and save again.") from error
    if isinstance(saved.rule, PerRank) and not (isinstance(saved.value, list) and saved.value):
        raise RegistryMismatch(f"{name} was saved per rank, but without a value of each rank. Save again.")
    return saved


def _restore_per_rank(entry: _Object, values: JsonValue, rank: int, world_size: int) -> None:
    assert isinstance(entry.rule, PerRank)
    assert isinstance(values, list)
    if len(values) == world_size:
        entry.set(values[rank])
    elif entry.rule.on_change == "sum":
        total = functools.reduce(_add, values)
        entry.set(total if rank == 0 else _add(total, total, sign=-1))


def _add(a: JsonValue, b: JsonValue, sign: int = 1) -> JsonValue:
    """Sum of two numbers, or of two objects of numbers by key."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {key: _add(a.get(key, 0), b.get(key, 0), sign) for key in [*a, *(key for key in b if key not in a)]}
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a + sign * b
    raise RegistryMismatch(f"{a!r} and {b!r} cannot be summed. Use numbers, or PerRank(on_change='drop').")


def _gather(values: dict[str, JsonValue], communicator: Communicator) -> list[dict[str, JsonValue]]:
    """The values of every rank, by rank. Collective."""
    import torch

    payload = json.dumps(values).encode()
    sizes = torch.empty(communicator.size, dtype=torch.int64)
    communicator.all_gather(sizes, torch.tensor([len(payload)]), _CALL_SITE)
    width = int(sizes.max())
    padded = torch.frombuffer(bytearray(payload.ljust(width)), dtype=torch.uint8)
    gathered = torch.empty(communicator.size * width, dtype=torch.uint8)
    communicator.all_gather(gathered, padded, _CALL_SITE)
    return [json.loads(row.numpy().tobytes()) for row in gathered.view(communicator.size, width)]


@functools.cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(StateDescription)


@functools.cache
def _rule_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Rule)


@functools.cache
def _saved_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(_Saved)

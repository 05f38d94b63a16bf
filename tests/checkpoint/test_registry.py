"""The registry saves what was registered, gives it back on other world sizes by its rules, and names what is amiss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import JsonValue

from evermesh.checkpoint import (
    Interval,
    PerRank,
    RegistryMismatch,
    Replicated,
    Shard,
    Sharded,
    StateDescription,
    StateRegistry,
    TensorShards,
    load,
    save,
)
from evermesh.parallelism.collectives import Communicator
from tests.cluster import run_ranks

RULES: dict[str, Replicated | PerRank] = {
    "rng": Replicated(),
    "queue": PerRank("drop"),
    "tokens": PerRank("sum"),
    "pinned": PerRank("refuse"),
}


def _registry(values: dict[str, Any], rules: dict[str, Replicated | PerRank] = RULES) -> StateRegistry:
    registry = StateRegistry()
    for name, rule in rules.items():
        registry.register(name, rule, _getter(values, name), _setter(values, name))
    return registry


def _getter(values: dict[str, Any], name: str) -> Callable[[], JsonValue]:
    return lambda: values[name]


def _setter(values: dict[str, Any], name: str) -> Callable[[JsonValue], None]:
    return lambda value: values.__setitem__(name, value)


def _values(rank: int) -> dict[str, Any]:
    return {"rng": {"model": [1, 2]}, "queue": ["a"] * rank, "tokens": {"seen": rank + 1, "loss": 0.5}, "pinned": rank}


def _objects_on_rank(rank: int, world_size: int) -> dict[str, JsonValue]:
    return _registry(_values(rank)).objects(Communicator(dist.group.WORLD))


@pytest.fixture(scope="module")
def objects() -> dict[str, JsonValue]:
    answers: list[dict[str, JsonValue]] = run_ranks(3, _objects_on_rank)
    assert answers[0] == answers[1] == answers[2]
    return answers[0]


def test_on_the_same_number_of_ranks_every_rank_gets_its_own_values_back(objects: dict[str, JsonValue]) -> None:
    for rank in range(3):
        values: dict[str, Any] = {}
        _registry(values).restore(objects, rank, 3)
        assert values == _values(rank)


def test_on_another_number_of_ranks_each_entry_follows_its_rule(objects: dict[str, JsonValue]) -> None:
    rules = {name: rule for name, rule in RULES.items() if name != "pinned"}
    fewer = {name: value for name, value in objects.items() if name != "pinned"}
    for rank in range(2):
        values: dict[str, Any] = {}
        _registry(values, rules).restore(fewer, rank, 2)
        total = {"seen": 6, "loss": 1.5} if rank == 0 else {"seen": 0, "loss": 0.0}
        assert values == {"rng": {"model": [1, 2]}, "tokens": total}


def test_an_entry_that_refuses_the_change_is_named_and_nothing_is_restored(objects: dict[str, JsonValue]) -> None:
    values: dict[str, Any] = {}
    with pytest.raises(RegistryMismatch, match="pinned refuses to go from 3 to 2 ranks"):
        _registry(values).restore(objects, 0, 2)
    assert values == {}


def test_missing_unknown_and_changed_entries_are_named(objects: dict[str, JsonValue]) -> None:
    rules: dict[str, Replicated | PerRank] = {"rng": PerRank("drop"), "cursor": Replicated()}
    with pytest.raises(RegistryMismatch) as caught:
        _registry({}, rules).restore(objects, 0, 3)
    text = str(caught.value)
    assert "cursor is not in the checkpoint" in text
    assert "queue is not registered" in text
    assert "rng was saved as Replicated" in text


def test_objects_of_another_making_are_refused() -> None:
    with pytest.raises(RegistryMismatch, match="rng was not saved by a registry"):
        _registry({}, {"rng": Replicated()}).restore({"rng": 3})


def test_numbers_that_cannot_be_summed_are_named(objects: dict[str, JsonValue]) -> None:
    with pytest.raises(RegistryMismatch, match="cannot be summed"):
        _registry({}, {"q": PerRank("sum")}).restore(
            {"q": {"rule": {"kind": "per-rank", "on_change": "sum"}, "value": ["a", "b"]}}
        )


def test_a_name_is_registered_once() -> None:
    registry = _registry({})
    with pytest.raises(RegistryMismatch, match="rng is registered twice"):
        registry.register_tensor("rng", TensorShards("float32", (), ()))


def test_the_description_survives_json() -> None:
    registry = _registry({})
    registry.register_tensor("w", TensorShards("float32", (2,), (Shard(Interval(0, 2), (0,)),)), torch.zeros(2))
    assert registry.description.entries["w"] == Sharded()
    assert StateDescription.from_json(registry.description.to_json()) == registry.description
    with pytest.raises(RegistryMismatch):
        StateDescription.from_json(b'{"entries": {"w": {"kind": "other"}}}')


def test_a_registry_goes_through_a_checkpoint(tmp_path: Path) -> None:
    values = _values(0)
    registry = _registry(values)
    tensor = torch.arange(2.0)
    registry.register_tensor("w", TensorShards("float32", (2,), (Shard(Interval(0, 2), (0,)),)), tensor)
    path = save(tmp_path, 1, registry.shard_map, registry.tensors, registry.objects())
    values.clear()
    got = torch.zeros(2)
    registry.restore(load(path, {"w": (Interval(0, 2), got)}).objects)
    assert values == _values(0)
    assert torch.equal(got, tensor)

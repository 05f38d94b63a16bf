"""Training that goes on from the memory of its nodes is the training that nothing happened to, bit for bit."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from evermesh.checkpoint import latest
from evermesh.checkpoint.committing import step_of
from evermesh.fault.events import Event, read_events
from evermesh.fault.snapshot.keeper.area import area_of
from evermesh.fault.snapshot.keeper.slots import Header, SlotFiles, held_by
from evermesh.fault.snapshot.snapshots import Keeping
from evermesh.runtime import TrainConfig, read_telemetry
from evermesh.runtime.trainer import Trainer
from tests.cluster import RankFailed, run_ranks
from tests.fault.snapshot.keepers import keeper_of, kill_keeper
from tests.runtime.test_trainer import largest_difference, small_config

KILLED_AT = 5


def _config(corpus: Path, **changes: Any) -> dict[str, Any]:
    """Of a run that writes no checkpoint before its end."""
    return small_config(corpus, checkpoint={"every": None}, snapshot={"every": 1}, layout={"capacity": 300}) | changes


def _fit(
    rank: int,
    workers: int,
    values: dict[str, Any],
    directory: Path,
    generation: int,
    killed: dict[int, str],
    nodes: int = 1,
) -> dict[str, torch.Tensor]:
    """Train; ``killed`` ranks end by themselves in step ``KILLED_AT``, between two steps or inside the copy behind it."""
    os.environ["LOCAL_WORLD_SIZE"] = str(workers // nodes)
    area = area_of(directory, f"node-{rank * nodes // workers}")
    layout = {"hdp": workers} | values["layout"]
    config = TrainConfig.model_validate(values | {"layout": layout})
    trainer = Trainer(config, directory=directory, keeping=Keeping(area, generation))
    if rank in killed:
        _arrange_end(trainer, killed[rank])
    trainer.fit()
    return {name: parameter.detach().clone() for name, parameter in trainer.built.model.named_parameters()}


def _arrange_end(trainer: Trainer, when: str) -> None:
    step = trainer.train_step

    def train_step(batch: Any) -> Any:
        snapshots = trainer.snapshots._snapshots
        if trainer.progress.step == KILLED_AT - 1:
            assert snapshots is not None
            assert snapshots._copies is not None
            if when == "between":
                os.kill(os.getpid(), signal.SIGKILL)
            for copy in snapshots._copies._copies:
                copy._copy = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        return step(batch)

    trainer.train_step = train_step  # type: ignore[method-assign]


@contextmanager
def _keepers(directory: Path, nodes: int = 1) -> Iterator[None]:
    directory.mkdir(exist_ok=True)
    with ExitStack() as stack:
        for node in range(nodes):
            stack.enter_context(keeper_of(directory, f"node-{node}"))
        yield


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[float]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    with _keepers(directory):
        parameters = run_ranks(2, _fit, _config(corpus), directory, 1, {})[0]
    assert _told(directory, "snapshots").fields["committed"]
    return parameters, _losses(directory)


def _losses(directory: Path) -> list[float]:
    return [report.loss for report in read_telemetry(directory / "telemetry.jsonl")]


def _told(directory: Path, kind: str) -> Event:
    return [event for event in read_events(directory / "events.jsonl") if event.kind == kind][-1]


def _kill_and_go_on(directory: Path, values: dict[str, Any], killed: dict[int, str], nodes: int = 1) -> Any:
    with pytest.raises(RankFailed):
        run_ranks(2, _fit, values, directory, 1, killed, nodes)
    assert latest(directory / "checkpoints") is None, "there is nothing in storage"
    return run_ranks(2, _fit, values, directory, 2, {}, nodes)[0]


def _regroup(
    rank: int, workers: int, values: dict[str, Any], directory: Path, loses_keeper: bool
) -> tuple[int, str, bool]:
    """Train on two nodes until asked to regroup behind a step of which no snapshot is due: step, reason, saved."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    config = TrainConfig.model_validate(values | {"layout": {"hdp": workers} | values["layout"]})
    area = area_of(directory, f"node-{rank}")

    def asked() -> Literal["regroup"] | None:
        if trainer.progress.step != KILLED_AT:
            return None
        if loses_keeper:
            kill_keeper(area)
        return "regroup"

    trainer = Trainer(config, directory=directory, asked=asked, keeping=Keeping(area, 1))
    result = trainer.fit()
    return result.step, result.reason, result.checkpoint is not None


@pytest.mark.parametrize("loses_keeper", [False, True], ids=["in memory", "in storage, for a keeper is gone"])
def test_ranks_that_regroup_leave_the_very_step_to_the_next_ones(
    loses_keeper: bool, corpus: Path, undisturbed: tuple[dict[str, torch.Tensor], list[float]], tmp_path: Path
) -> None:
    values = _config(corpus, snapshot={"every": 2 * KILLED_AT})
    with _keepers(tmp_path, 2):
        assert run_ranks(2, _regroup, values, tmp_path, loses_keeper) == [(KILLED_AT, "regroup", loses_keeper)] * 2
        saved = latest(tmp_path / "checkpoints")
        assert (saved is not None) == loses_keeper
        if saved is None:
            parameters = run_ranks(2, _fit, values, tmp_path, 2, {}, 2)[0]
            assert (_told(tmp_path, "resumed").step, _told(tmp_path, "resumed").fields["source"]) == (
                KILLED_AT,
                "memory",
            )
            assert largest_difference(parameters, undisturbed[0]) == 0.0
            assert _losses(tmp_path) == undisturbed[1]
        else:
            assert step_of(saved) == KILLED_AT


@pytest.mark.parametrize(
    ("killed", "nodes"),
    [({1: "between"}, 1), ({0: "inside", 1: "inside"}, 2)],
    ids=["f1 one rank", "f2 f26 all, inside"],
)
def test_killed_ranks_go_on_from_memory(
    killed: dict[int, str],
    nodes: int,
    corpus: Path,
    undisturbed: tuple[dict[str, torch.Tensor], list[float]],
    tmp_path: Path,
) -> None:
    with _keepers(tmp_path, nodes):
        parameters = _kill_and_go_on(tmp_path, _config(corpus), killed, nodes)
    resumed = _told(tmp_path, "resumed")
    assert resumed.fields["source"] == "memory"
    assert KILLED_AT - 3 <= int(str(resumed.step)) < KILLED_AT
    assert largest_difference(parameters, undisturbed[0]) == 0.0
    assert _losses(tmp_path) == undisturbed[1]


def test_how_often_is_chosen_by_what_was_measured_told_once_and_changes_no_bit(corpus: Path, tmp_path: Path) -> None:
    parameters, told = [], []
    for name, snapshot in (("chosen", {"most_cost": 0.5, "node_mtbf_h": 1e-4}), ("given", {"every": 3})):
        directory = tmp_path / name
        with _keepers(directory):
            parameters.append(run_ranks(2, _fit, _config(corpus, steps=60, snapshot=snapshot), directory, 1, {})[0])
        events = list(read_events(directory / "events.jsonl"))
        told.append([event for event in events if event.kind == "snapshot interval"])
        report = read_telemetry(directory / "telemetry.jsonl")[-1].snapshot
        assert report.step is not None
        assert report.committed >= 2
        assert report.every == told[-1][-1].fields["steps"]
    chosen, given = told
    assert 1 <= len(chosen) <= 20
    assert all(0 < float(str(event.fields["lost_share"])) <= 1 for event in chosen)
    assert "chosen: it stops training for " in chosen[0].text
    assert len(given) == 1
    assert "every 3 steps" in given[0].text
    assert "as configured" in given[0].text
    assert largest_difference(*parameters) == 0.0


def _flip_a_byte(directory: Path, rank: int, step: int) -> None:
    area = area_of(directory, "node-0")
    held = next(held for held in held_by(area, rank) if held.record.step == step)
    with SlotFiles.of(area, rank, held.number).data.open("r+b") as data:
        data.seek(-100, os.SEEK_END)
        byte = data.read(1)[0]
        data.seek(-100, os.SEEK_END)
        data.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("damaged", [1, 2])
def test_f19_of_a_damaged_snapshot_the_older_one_is_used_and_of_two_nothing_stays(
    damaged: int, corpus: Path, undisturbed: tuple[dict[str, torch.Tensor], list[float]], tmp_path: Path
) -> None:
    values = _config(corpus)
    with _keepers(tmp_path):
        with pytest.raises(RankFailed):
            run_ranks(2, _fit, values, tmp_path, 1, {1: "between"})
        area = area_of(tmp_path, "node-0")
        common = sorted(set.intersection(*({held.record.step for held in held_by(area, rank)} for rank in range(2))))
        assert len(common) == 2
        for step in common[2 - damaged :]:
            _flip_a_byte(tmp_path, 1, step)
        parameters = run_ranks(2, _fit, values, tmp_path, 2, {})[0]
    told = [event for event in read_events(tmp_path / "events.jsonl") if event.kind == "snapshot damaged"]
    assert [event.step for event in told] == common[::-1][:damaged]
    assert "the checksum is wrong" in told[0].text
    if damaged == 1:
        assert _told(tmp_path, "resumed").step == common[0]
    assert largest_difference(parameters, undisturbed[0]) == 0.0
    assert _losses(tmp_path) == undisturbed[1]


def test_without_a_keeper_training_goes_on_and_says_so(
    corpus: Path,
    undisturbed: tuple[dict[str, torch.Tensor], list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = run_ranks(2, _fit_without_patience, _config(corpus), tmp_path)[0]
    assert largest_difference(parameters, undisturbed[0]) == 0.0
    assert "no snapshots are made" in _told(tmp_path, "memory").text
    assert "no keeper listens" in _told(tmp_path, "memory").text


def _fit_without_patience(rank: int, workers: int, values: dict[str, Any], directory: Path) -> dict[str, torch.Tensor]:
    from evermesh.fault.snapshot import snapshots

    snapshots._START_S = 0.1
    return _fit(rank, workers, values, directory, 1, {})


def _move(rank: int, workers: int, values: dict[str, Any], directory: Path) -> list[int]:
    area = area_of(directory, "node-0")
    config = TrainConfig.model_validate(values | {"layout": values["layout"] | {"hdp": workers}})
    trainer = Trainer(config, directory=directory, keeping=Keeping(area, 1))
    trainer.asked = lambda: {"tp": 2} if trainer.progress.step == 3 else None
    before = trainer.shards.digest()
    trainer.fit()
    assert trainer.shards.digest() != before
    assert trainer.config.layout.tp == 2
    found = held_by(area, rank)
    assert {held.record.shard_map for held in found} <= {trainer.shards.digest()}
    for held in found:
        header = Header(SlotFiles.of(area, rank, held.number).header)
        assert header.record == held.record
        header.close()
    return sorted(held.record.step for held in found)


def test_a_run_that_moves_to_another_layout_makes_snapshots_in_it(corpus: Path, tmp_path: Path) -> None:
    values = _config(corpus, layout={"capacity": 600})
    with _keepers(tmp_path):
        steps = run_ranks(2, _move, values, tmp_path)
    assert steps[0] == steps[1]
    assert steps[0][-1] >= 5

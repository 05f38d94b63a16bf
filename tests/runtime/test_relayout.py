"""A running job moves between layouts through memory: bit for bit what saving and resuming would have given."""

import functools
import itertools
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from evermesh.checkpoint import ShardMap
from evermesh.fault.events import Event, read_events
from evermesh.parallelism import Layout
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.runtime import StepReport, TrainConfig, read_telemetry
from evermesh.runtime.data.config import OutlierDelay
from evermesh.runtime.layout import changed_layout
from evermesh.runtime.trainer import Trainer
from tests.checkpoint.test_relayout import least_bytes
from tests.cluster import run_ranks
from tests.runtime.test_advice import EAGER
from tests.runtime.test_layout_trainer import LAYOUTS, MODELS, SIZES

PLACES: dict[str, dict[str, Any]] = LAYOUTS | {
    "two": {"hdp": 2},
    "two of experts": {"hdp": 2, "ep": 2},
    "shared": {"tp": 2},
    "four": {"hdp": 4},
    "shared by two": {"hdp": 2, "tp": 2},
    "zero-3": {"hdp": 4, "sharding": {"parameters": "all", "gradients": "all"}},
    "stages": {"pp": 4},
}
STEP = 2
"""Behind which a run moves."""


class Ended(NamedTuple):
    """What one rank knows at the end."""

    biases: list[list[float]]
    groups: list[int]
    """Process groups of this rank, by step."""
    maps: list[ShardMap]
    """Of every layout that it had."""
    received: list[tuple[int, ...]]
    """Of every move, by rank."""


def _config(corpus: Path, model: str, layout: str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": SIZES | MODELS[model],
        "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 900},
        "layout": _layout(layout),
        "optimizer": {"kind": "lamb" if "LAMB" in model else "adamw", "warmup_steps": 2, "clip_norm": 0.1},
        "checkpoint": {"every": STEP},
        "dtype": "float64",
        "steps": 4,
        "seed": 5,
    }
    return TrainConfig.model_validate(values | changes)


def _layout(name: str) -> dict[str, Any]:
    return PLACES[name] | {"capacity": 520 // PLACES[name].get("hdp", 1)}


def _changes(before: str, after: str) -> dict[str, Any]:
    """What is to be asked in one layout for the other."""
    there = Layout.model_validate(_layout(after)).model_dump(mode="json")
    return {name: there[name] for name in _layout(before) | _layout(after)}


def _fit(
    rank: int, workers: int, config: TrainConfig, directory: Path, moves: Mapping[int, Any], resume: bool
) -> Ended:
    """``moves``: by step, what is asked behind it."""
    from torch.distributed import distributed_c10d

    trainer = Trainer(config, directory=directory, resume=resume, asked=lambda: moves.get(trainer.progress.step))
    ended = Ended([], [], [trainer.state.registry.shard_map], [])
    train_step, move_to, build = trainer.train_step, trainer.move_to, trainer.build

    def counting(batch: Any) -> Any:
        ended.groups.append(len(distributed_c10d._world.pg_map))
        return train_step(batch)

    def noting(move: Any) -> Any:
        model = weakref.ref(trainer.built.model)

        def building(*arguments: Any, **named: Any) -> None:
            assert model() is None, "somebody keeps the old model while the new one is built"
            build(*arguments, **named)

        trainer.build = building  # type: ignore[method-assign]
        moved = move_to(move)
        ended.maps.append(trainer.state.registry.shard_map)
        ended.received.append(moved.received_bytes)
        return moved

    trainer.train_step, trainer.move_to = counting, noting  # type: ignore[method-assign]
    trainer.fit()
    return ended._replace(biases=trainer.progress.router_biases)


def _train(
    config: TrainConfig, directory: Path, moves: Mapping[int, Any] | None = None, *, resume: bool = False
) -> list[Ended]:
    directory.mkdir(exist_ok=True)
    return run_ranks(config.layout.world_size, _fit, config, directory, moves or {}, resume)


def _reports(directory: Path) -> list[StepReport]:
    return read_telemetry(directory / "telemetry.jsonl")


def _events(directory: Path, kind: str) -> list[Event]:
    return [event for event in read_events(directory / "events.jsonl") if event.kind == kind]


@pytest.fixture(scope="module")
def alone(odd_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[StepReport]]:
    """Every step of a run of one process, by model."""

    def run(model: str) -> list[StepReport]:
        directory = tmp_path_factory.mktemp("alone")
        _train(_config(odd_corpus, model, "alone"), directory)
        return _reports(directory)

    return functools.cache(run)


IN_CI = [("tied", "shared", "two"), ("experts", "no bubbles", "two of experts"), ("tied", "stages", "shared by two")]
MATRIX = [
    *zip(
        itertools.cycle(["experts", "tied", "experts under LAMB"]),
        itertools.permutations(["pipeline", "interleaved", "shared by two", "four"], 2),
        strict=False,
    ),
    *(("experts", pair) for pair in itertools.permutations(["pipeline", "experts", "divided"], 2)),
    *(("tied", pair) for pair in itertools.permutations(["zero-3", "stages", "four"], 2)),
    *(("tied", pair) for pair in itertools.permutations(["two", "shared", "no bubbles"], 2)),
]
REST = [case for case in ((model, *pair) for model, pair in MATRIX) if case not in IN_CI]


@pytest.mark.parametrize(
    ("model", "first", "then"), [*IN_CI, *(pytest.param(*case, marks=pytest.mark.parity) for case in REST)]
)
def test_a_run_that_moves_is_bit_for_bit_the_run_that_is_saved_and_resumed(
    model: str,
    first: str,
    then: str,
    odd_corpus: Path,
    alone: Callable[[str], list[StepReport]],
    tmp_path: Path,
) -> None:
    ended = _train(_config(odd_corpus, model, first), tmp_path / "moved", {STEP: _changes(first, then)})
    saved = f"checkpoints/step-{STEP:08}"  # before it moved
    shutil.copytree(tmp_path / "moved" / saved, tmp_path / "resumed" / saved)
    resumed = _train(_config(odd_corpus, model, then), tmp_path / "resumed", resume=True)
    reports, expected = _reports(tmp_path / "moved"), _reports(tmp_path / "resumed")
    for ours, theirs in zip(reports[STEP:], expected, strict=True):
        assert (ours.batch, ours.loss, ours.grad_norm) == (theirs.batch, theirs.loss, theirs.grad_norm)
        assert ours.traffic == theirs.traffic
    digests = [_events(tmp_path / name, "finished")[0].fields["parameters"] for name in ("moved", "resumed")]
    assert digests[0] == digests[1]
    for ours, theirs in zip(reports, alone(model), strict=True):
        assert ours.batch == theirs.batch
        assert [ours.loss, ours.grad_norm] == pytest.approx([theirs.loss, theirs.grad_norm], rel=1e-9)
    for one, other in zip(ended, resumed, strict=True):
        assert one.biases == other.biases
        assert one.groups[-1] == other.groups[-1], "groups of the old layout are left"
        assert one.received == [least_bytes(one.maps[0], one.maps[1], len(ended))]
    (event,) = _events(tmp_path / "moved", "layout moved")
    print(f"\n{event.text}")
    assert event.step == STEP
    assert event.fields["bytes_moved"] == sum(ended[0].received[0]) == reports[STEP].relayout_bytes
    assert reports[STEP].relayout_s >= event.fields["seconds"] > 0  # type: ignore[operator]


@pytest.mark.parity
def test_the_next_50_losses_are_those_of_a_run_that_was_always_there(odd_corpus: Path, tmp_path: Path) -> None:
    steps = STEP + 50
    for name, layout, moves in (("moved", "shared", {STEP: _changes("shared", "two")}), ("there", "two", {})):
        _train(_config(odd_corpus, "tied", layout, steps=steps), tmp_path / name, moves)
    saved = f"checkpoints/step-{STEP:08}"
    _train(_config(odd_corpus, "tied", "shared", stop_at=STEP, steps=steps), tmp_path / "resumed")
    assert (tmp_path / "resumed" / saved).is_dir()
    _train(_config(odd_corpus, "tied", "two", steps=steps), tmp_path / "resumed", resume=True)
    losses = {name: [report.loss for report in _reports(tmp_path / name)] for name in ("moved", "there", "resumed")}
    assert len(losses["moved"]) == steps
    assert losses["moved"] == losses["resumed"]
    assert losses["moved"] == pytest.approx(losses["there"], rel=1e-9)


@pytest.mark.parity
def test_compiled_blocks_are_compiled_anew(
    odd_corpus: Path, alone: Callable[[str], list[StepReport]], tmp_path: Path
) -> None:
    config = _config(odd_corpus, "tied", "shared", compile={"buckets": [260, 520]})
    _train(config, tmp_path, {STEP: _changes("shared", "two")})
    reports = _reports(tmp_path)
    for ours, theirs in zip(reports, alone("tied"), strict=True):
        assert [ours.loss, ours.grad_norm] == pytest.approx([theirs.loss, theirs.grad_norm], rel=1e-9)
    assert 0 < reports[STEP - 1].compiled_graphs < reports[STEP].compiled_graphs


def test_a_run_moves_there_and_back_and_is_the_run_that_stayed(odd_corpus: Path, tmp_path: Path) -> None:
    moves = {1: _changes("two", "shared"), 2: {"tp": 3}, 3: _changes("shared", "two")}
    """Sequences that wait to be trained later, and documents that are held out, come along."""
    config = _config(odd_corpus, "tied", "two", evaluation={"every": 1, "tokens": 200})
    delayed = config.data.model_copy(update={"outlier_delay": OutlierDelay(thresholds=(60,), together=2)})
    config = config.model_copy(update={"data": delayed})
    ended = _train(config, tmp_path, moves)
    assert all(len(one.maps) == 3 and one.maps[0] == one.maps[2] for one in ended)
    assert [event.step for event in _events(tmp_path, "layout moved")] == [1, 3]
    (refused,) = _events(tmp_path, "layout refused")
    assert "tp 3" in refused.text
    assert refused.fields["changes"] == {"tp": 3}
    reports = _reports(tmp_path)
    assert [report.relayout_bytes > 0 for report in reports] == [False, True, False, True]
    assert all(report.held_out_loss is not None for report in reports)
    assert reports[0].num_waiting > 0
    assert any(report.most_steps_late > 0 for report in reports)
    _train(config, tmp_path / "stayed")
    for ours, theirs in zip(reports, _reports(tmp_path / "stayed"), strict=True):
        assert ours.batch == theirs.batch
        values = [[one.loss, one.grad_norm, one.held_out_loss] for one in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_a_run_that_is_advised_to_moves_by_itself(odd_corpus: Path, tmp_path: Path) -> None:
    """Tensor parallel ranks over a slow link, where two HDP ranks would do."""
    advised = {"advise_layout": EAGER | {"moves": True}, "steps": 6}
    ended = _train(_config(odd_corpus, "tied", "shared", **advised), tmp_path)
    assert all(len(one.maps) == 2 for one in ended)
    (moved,) = _events(tmp_path, "layout moved")
    assert "tp" in moved.fields["before"]  # type: ignore[operator]
    assert "tp" not in moved.fields["layout"]  # type: ignore[operator]
    assert "instead of" in moved.text
    (advice,) = _events(tmp_path, "layout advice")
    assert advice.fields["layout"] == moved.fields["layout"]


def _calibrated(rank: int, workers: int, config: TrainConfig) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What was known of the cost model behind each of two moves, and right after it."""
    asked: dict[int, Any] = {2: {"capacity": 300}, 3: {"tp": 2, "capacity": 600}}
    trainer = Trainer(config, asked=lambda: asked.get(trainer.progress.step))
    found, move_to = [], trainer.move_to

    def noting(move: Any) -> Any:
        before = trainer.progress.calibration
        moved = move_to(move)
        found.append((before, trainer.progress.calibration))
        return moved

    trainer.move_to = noting  # type: ignore[method-assign]
    trainer.fit()
    return found


def test_what_a_run_has_measured_stays_where_it_still_holds(odd_corpus: Path) -> None:
    config = _config(odd_corpus, "tied", "two", calibrate={"every": 1, "leaves_out": 0})
    for (before, after), (_, elsewhere) in run_ranks(2, _calibrated, config):
        assert before["calibration"] != {}
        assert after == before
        assert elsewhere == {}  # a device has other coefficients where two share a model


def test_a_run_that_is_to_be_the_same_every_time_does_not_move_by_itself(odd_corpus: Path) -> None:
    assert _config(odd_corpus, "tied", "two", advise_layout=True, deterministic=True).advise_layout is not None
    with pytest.raises(ValueError, match="the clock decides when"):
        _config(odd_corpus, "tied", "two", advise_layout={"moves": True}, deterministic=True)


def test_changes_to_a_layout_keep_the_ranks() -> None:
    layout = Layout(hdp=4, capacity=100)
    assert changed_layout(layout, {"tp": 2}) == Layout(hdp=2, tp=2, capacity=100)
    assert changed_layout(layout, {"tp": 2, "hdp": 4}).world_size == 8  # refused later, with the number of ranks
    with pytest.raises(LayoutDoesNotFit, match="do not divide 4 workers"):
        changed_layout(layout, {"tp": 3})
    with pytest.raises(ValueError, match="tpp"):
        changed_layout(layout, {"tpp": 3})


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"tp": 2, "hdp": 2}, "4 ranks, but 2 were started"),
    ({"tp": 2, "capacity": 20}, "hold 20. Set capacity to at least"),
    ({"ep": 2}, "no experts to share"),
    ({"sharding": {"kind": "deepspeed", "stage": 1}}, "DeepSpeed"),
    ({"pp": 8}, "do not divide 2 workers"),
    ({"tpp": 2}, "tpp: Extra inputs"),
    ({"hdp": 2}, "it is the layout in use"),
)


def test_what_cannot_be_is_told_and_the_run_goes_on(odd_corpus: Path, tmp_path: Path) -> None:
    moves = {step: changes for step, (changes, _) in enumerate(REFUSED, 1)}
    config = _config(odd_corpus, "tied", "two", steps=len(REFUSED), dtype="float32")
    ended = _train(config, tmp_path, moves)
    assert len(ended[0].maps) == 1
    for event, (changes, told) in zip(_events(tmp_path, "layout refused"), REFUSED, strict=True):
        assert told in event.text
        assert event.fields["changes"] == changes
    assert len(_reports(tmp_path)) == len(REFUSED)

"""DeepSpeed under our trainer against our own sharding, and against one worker in float64. The library is real."""

import importlib.util
import itertools
import multiprocessing
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from evermesh import checkpoint
from evermesh.checkpoint.directory import read_manifest
from evermesh.parallelism import BatchPlan, MicroBatch, Piece
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.ledger import Traffic, add_up, collective_traffic
from evermesh.parallelism.planner import Planner
from evermesh.runtime import StepReport, TrainConfig
from evermesh.runtime.deepspeed_engine import partitions
from evermesh.runtime.deepspeed_engine.partitions import fragments, groups_of, partition_size, shard_map
from evermesh.runtime.errors import EngineDiffers, EngineMissing
from evermesh.runtime.layout import check_layout
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks
from tests.oracle import relative_error
from tests.runtime.saved import newest_tensors

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is missing")
MODEL = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "initial_std": 0.1}
MIXTURE = {"experts": 4, "ffn": 16, "shared_ffn": 16, "balancing": {"kind": "bias", "rate": 0.01}}
STEPS, BAD_STEP = 4, 2
NATIVE = "native"
"""Below the directory of a run: a checkpoint that the library wrote itself at its end."""
SAVED_BY_LIBRARY = ("stage 1", "stage 2, states on the host", "stage 3", "stage 3, all on the host")
SHARDINGS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3, "whole_below": 0},
    "stage 3, small ones whole": {"stage": 3, "whole_below": 200},
    "stage 1, states on the host": {"stage": 1, "offload": "optimizer"},
    "stage 2, states on the host": {"stage": 2, "offload": "optimizer"},
    "stage 3, all on the host": {"stage": 3, "offload": "parameters", "whole_below": 0},
    "stage 2, many buckets": {"stage": 2, "bucket": 2000},
}


def _values(corpus: Path, **changes: Any) -> dict[str, Any]:
    data = {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 1500}
    values: dict[str, Any] = {
        "model": MODEL,
        "data": data | changes.pop("data", {}),
        "optimizer": {"warmup_steps": 2, "clip_norm": 0.5, "weight_decay": 0.3},
        "checkpoint": {"every": None},
        "steps": STEPS,
    }
    return values | changes


def _config(corpus: Path, hdp: int, sharding: dict[str, Any] | None, **changes: Any) -> TrainConfig:
    """``sharding`` None: our own."""
    layout: dict[str, Any] = {"hdp": hdp, "capacity": 600 // hdp} | changes.pop("layout", {})
    if sharding is not None:
        layout["sharding"] = {"kind": "deepspeed"} | sharding
    return TrainConfig.model_validate(_values(corpus, layout=layout, **changes))


class Run(NamedTuple):
    """What one rank saw of a run."""

    reports: list[StepReport]
    """On rank 0."""
    plans: list[BatchPlan]
    directory: Path


def _on_rank(
    rank: int, workers: int, configs: dict[str, TrainConfig], folder: Path, bad_step: int | None
) -> dict[str, Run]:
    """Several runs in one process, because the library is imported for seconds. In the backward pass of ``bad_step`` the
    loss of rank 0 is not a number."""
    runs = {}
    for name, config in configs.items():
        reports: list[StepReport] = []
        plans: list[BatchPlan] = []
        directory = folder / name
        directory.mkdir(exist_ok=True)
        trainer = Trainer(config, directory=directory, report=reports.append)
        if "uneven" in name:
            trainer.planner = Uneven(trainer.planner)
        _watch(trainer, plans, bad_step if rank == 0 else None)
        trainer.fit()
        if name in SAVED_BY_LIBRARY:
            trainer.optimizer.engine.save_checkpoint(str(directory / NATIVE))  # type: ignore[attr-defined]
        runs[name] = Run(reports, plans, directory)
    return runs


def _watch(trainer: Trainer, plans: list[BatchPlan], bad_step: int | None) -> None:
    step, backward = trainer.train_step, trainer.runner._backward

    def train_step(batch: Any) -> Any:
        plans.append(batch.plan)
        return step(batch)

    def spoiled(loss: Tensor, *, is_last: bool) -> None:
        backward(loss * float("nan") if trainer.progress.step == bad_step else loss, is_last=is_last)

    trainer.train_step, trainer.runner._backward = train_step, spoiled  # type: ignore[method-assign]


def _train(configs: dict[str, TrainConfig], folder: Path, bad_step: int | None = None) -> dict[str, Run]:
    """By name; those with ``uneven`` in it get uneven plans."""
    workers = {config.layout.world_size for config in configs.values()}
    assert len(workers) == 1
    return run_ranks(workers.pop(), _on_rank, configs, folder, bad_step, timeout_s=170.0)[0]


def _assert_same(run: Run, oracle: Run, rel: float = 1e-6) -> None:
    assert [report.batch for report in run.reports] == [report.batch for report in oracle.reports]
    for ours, theirs in zip(run.reports, oracle.reports, strict=True):
        assert ours.committed == theirs.committed
        assert ours.loss == pytest.approx(theirs.loss, rel=rel)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=rel, nan_ok=True)


FEW_TOKENS, EVERYTHING = "few tokens", "experts, tied, recomputed, evaluated"
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    FEW_TOKENS: {"data": {"context": 200, "batch_tokens": 60}},
    EVERYTHING: {
        "model": MODEL | {"tied_embeddings": True, "moe": MIXTURE, "qk_norm": True},
        "evaluation": {"every": 2, "tokens": 700},
        "layout": {"activations": "recompute"},
    },
    "bfloat16": {"dtype": "bfloat16"},
}
"""What is trained otherwise. With experts there are parameters that no token may use, and with tied embeddings one that two
modules share."""


@pytest.fixture(scope="module")
def oracles(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One worker, our own optimizer, float64, by variant; one step is bad."""
    configs = {name: _config(corpus, 1, None, **(changes | {"dtype": "float64"})) for name, changes in VARIANTS.items()}
    return _train(configs, tmp_path_factory.mktemp("oracle"), BAD_STEP)


@pytest.fixture
def oracle(oracles: dict[str, Run]) -> Run:
    """Of the model as it is."""
    return oracles[""]


class Result(NamedTuple):
    """What two workers did."""

    runs: dict[str, Run]
    refusal: str
    """Of rank 0, when it expects the library to divide parameters in another way."""


def _on_rank_and_refused(rank: int, workers: int, configs: dict[str, TrainConfig], folder: Path) -> Result:
    runs = _on_rank(rank, workers, configs, folder, BAD_STEP)
    partitions.ALIGNMENT = 64
    try:
        Trainer(configs["stage 1"])
    except EngineDiffers as refusal:
        return Result(runs, str(refusal))
    return Result(runs, "not refused")


@pytest.fixture(scope="module")
def two_ranks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Every sharding on two workers; one step is bad."""
    configs = {name: _config(corpus, 2, sharding) for name, sharding in SHARDINGS.items()}
    return run_ranks(2, _on_rank_and_refused, configs, tmp_path_factory.mktemp("runs"), timeout_s=170.0)[0]


@pytest.fixture
def runs(two_ranks: Result) -> dict[str, Run]:
    """By sharding."""
    return two_ranks.runs


@pytest.fixture(scope="module")
def variants(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Other models, types and plans on two workers; one step is bad."""
    offloaded = {"stage": 1, "offload": "optimizer"}
    configs = {
        "uneven": _config(corpus, 2, {"stage": 1}),
        "uneven, states on the host": _config(corpus, 2, offloaded),
        "uneven, few tokens": _config(corpus, 2, {"stage": 1}, **VARIANTS[FEW_TOKENS]),
        "uneven, few tokens, states on the host": _config(corpus, 2, offloaded, **VARIANTS[FEW_TOKENS]),
        EVERYTHING: _config(corpus, 2, {"stage": 3, "whole_below": 0}, **VARIANTS[EVERYTHING]),
        "own bfloat16": _config(corpus, 2, None, dtype="bfloat16"),
        "stage 1 bfloat16": _config(corpus, 2, {"stage": 1}, dtype="bfloat16"),
        "stage 3 bfloat16": _config(corpus, 2, {"stage": 3}, dtype="bfloat16"),
    }
    return _train(configs, tmp_path_factory.mktemp("variants"), BAD_STEP)


@pytest.mark.parametrize("name", SHARDINGS)
def test_a_run_is_that_of_one_worker_and_a_bad_step_changes_nothing(
    name: str, runs: dict[str, Run], oracle: Run
) -> None:
    run = runs[name]
    _assert_same(run, oracle)
    assert [report.committed for report in run.reports] == [step != BAD_STEP for step in range(1, STEPS + 1)]
    assert any(report.grad_norm > 0.5 for report in run.reports), "clipping was not at work"
    assert any(max(report.plan.ring_sizes) == 2 for report in run.reports), "no ring"
    expected, saved = newest_tensors(oracle.directory / "checkpoints"), newest_tensors(run.directory / "checkpoints")
    assert saved.keys() == expected.keys()
    for tensor_name, tensor in saved.items():
        assert tensor.dtype == torch.float32
        assert relative_error(tensor.double(), expected[tensor_name]) <= 1e-5, tensor_name


@pytest.mark.parametrize("name", SAVED_BY_LIBRARY)
def test_what_the_library_saves_itself_is_the_same_state(name: str, runs: dict[str, Run]) -> None:
    source = checkpoint.open_checkpoint(runs[name].directory / NATIVE)
    saved = newest_tensors(runs[name].directory / "checkpoints")
    assert source.tensors.keys() == saved.keys()
    for tensor_name, tensor in saved.items():
        got = torch.empty_like(tensor)
        checkpoint.load(source, {tensor_name: (checkpoint.Interval(0, got.numel()), got)}, strict=False)
        assert torch.equal(got, tensor), tensor_name


def _adopt_on_rank(rank: int, workers: int, config: TrainConfig, native: Path, folder: Path) -> int:
    """A new run under our own sharding that takes over a checkpoint of the library, and saves it as ours."""
    trainer = Trainer(config, directory=folder)
    loaded = trainer.state.adopt(checkpoint.open_checkpoint(native))
    trainer.save()
    return loaded.bytes_read


def test_a_run_of_ours_goes_on_from_a_checkpoint_of_the_library(
    runs: dict[str, Run], corpus: Path, tmp_path: Path
) -> None:
    run = runs["stage 3"]
    config = _config(corpus, 3, None)
    bytes_read = run_ranks(3, _adopt_on_rank, config, run.directory / NATIVE, tmp_path, timeout_s=120.0)
    expected, adopted = newest_tensors(run.directory / "checkpoints"), newest_tensors(tmp_path / "checkpoints")
    assert adopted.keys() == expected.keys()
    assert all(torch.equal(adopted[name], tensor) for name, tensor in expected.items())
    assert sum(bytes_read) == sum(tensor.nbytes for tensor in expected.values())  # each byte by one rank
    path = checkpoint.latest(tmp_path / "checkpoints")
    assert path is not None
    updates: Any = read_manifest(path).objects["updates"]
    assert updates["value"] == STEPS - 1


@pytest.mark.parametrize("name", ["stage 1", "stage 2", "stage 3"])
def test_the_ledger_counts_what_the_library_sends(name: str, runs: dict[str, Run], oracle: Run) -> None:
    """What a stage sends by formula; for stage 3 without parameters, which its prefetching gathers as it sees fit."""
    saved = newest_tensors(oracle.directory / "checkpoints")
    shapes = {n.removeprefix("parameter."): tuple(t.shape) for n, t in saved.items() if n.startswith("parameter.")}
    nodes, stage, run = (0, 0), int(name[-1]), runs[name]
    for report, plan in zip(run.reports, run.plans, strict=True):
        expected = add_up(_library_traffic(shapes, stage, plan, nodes, committed=report.committed))
        sites = {"gradients", "norms"} | ({"parameters"} if stage < 3 else set())
        assert tuple(t for t in report.traffic if t.axis == "hdp" and t.call_site in sites) == expected


def _library_traffic(
    shapes: dict[str, tuple[int, ...]], stage: int, plan: BatchPlan, nodes: tuple[int, ...], *, committed: bool
) -> Iterator[Traffic]:
    """Sums of gradients, behind the last micro-batch or (from stage 2 on) behind all; gathered parts; one norm per group."""
    ranks = len(nodes)
    sizes = [[torch.Size(shapes[name]).numel() for name in names] for names in groups_of(shapes)]
    for _ in range(1 if stage == 1 else len(plan.ranks[0])):
        if stage < 3:
            yield from collective_traffic("gradients", "all_reduce", "hdp", 4 * sum(map(sum, sizes)), nodes)
        else:
            padded = sum(-(-size // ranks) * ranks for group in sizes for size in group)
            yield from collective_traffic("gradients", "reduce_scatter", "hdp", 4 * padded, nodes)
    for group in sizes if committed else ():
        norm_bytes = 8 if stage == 3 else 4
        yield from collective_traffic("norms", "all_reduce", "hdp", norm_bytes, nodes)
        if stage < 3:
            yield from collective_traffic("parameters", "all_gather", "hdp", 4 * partition_size(group, ranks), nodes)


class Uneven:
    """Gives rank 0 a micro-batch for every whole sequence; the others keep theirs."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner

    def plan(self, lengths: Sequence[int]) -> BatchPlan:
        """See ``Planner``."""
        plan = self.planner.plan(lengths)
        split = [replace(mb, pieces=part) for mb in plan.ranks[0] for part in _parts(mb)]
        return replace(plan, ranks=(tuple(split), *plan.ranks[1:]))


def _parts(micro_batch: MicroBatch) -> list[tuple[Piece, ...]]:
    pieces = micro_batch.pieces
    return [pieces] if any(len(piece.ring) > 1 for piece in pieces) else [(piece,) for piece in pieces]


@pytest.mark.parametrize("variant", ["", FEW_TOKENS])
@pytest.mark.parametrize("host", ["", ", states on the host"])
def test_stage_1_takes_unequal_numbers_of_micro_batches(
    variant: str, host: str, variants: dict[str, Run], oracles: dict[str, Run]
) -> None:
    run = variants[f"uneven{', ' if variant else ''}{variant}{host}"]
    _assert_same(run, oracles[variant])
    counts = [tuple(len(of_rank) for of_rank in plan.ranks) for plan in run.plans]
    assert any(len(set(count)) == 2 for count in counts), counts
    assert any(0 in count for count in counts) == (variant == FEW_TOKENS)


def test_experts_tied_embeddings_recomputation_and_evaluation(
    variants: dict[str, Run], oracles: dict[str, Run]
) -> None:
    _assert_evaluated_alike(variants[EVERYTHING], oracles[EVERYTHING])


@pytest.mark.parity
def test_experts_and_tied_embeddings_in_every_stage(corpus: Path, oracles: dict[str, Run], tmp_path: Path) -> None:
    configs = {name: _config(corpus, 2, sharding, **VARIANTS[EVERYTHING]) for name, sharding in SHARDINGS.items()}
    for run in _train(configs, tmp_path, BAD_STEP).values():
        _assert_evaluated_alike(run, oracles[EVERYTHING])


def _assert_evaluated_alike(run: Run, wanted: Run) -> None:
    _assert_same(run, wanted)
    ours, theirs = ([report.held_out_loss for report in of.reports] for of in (run, wanted))
    assert [loss is None for loss in ours] == [True, False, True, False]
    assert ours[1::2] == pytest.approx(theirs[1::2], rel=1e-6)


def test_bfloat16_keeps_its_masters_in_float32(variants: dict[str, Run]) -> None:
    own = variants["own bfloat16"]
    for run in (variants["stage 1 bfloat16"], variants["stage 3 bfloat16"]):
        assert run.reports[0].loss == pytest.approx(own.reports[0].loss, rel=1e-4), "the same parameters at first"
        _assert_same(run, own, rel=2e-2)
        saved = newest_tensors(run.directory / "checkpoints")
        assert all(tensor.dtype == torch.float32 for tensor in saved.values())
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved.values())


@pytest.mark.parity
@pytest.mark.timeout(900)
def test_the_compiled_adam_steps_as_torch_does(corpus: Path, tmp_path: Path, oracle: Run) -> None:
    """It is compiled if no earlier run has left it in torch's folder of extensions: for minutes."""
    shardings = [
        {"stage": 2, "offload": "optimizer", "adam": "deepspeed"},
        {"stage": 3, "offload": "parameters", "adam": "deepspeed"},
    ]
    configs = {f"{number}": _config(corpus, 2, sharding) for number, sharding in enumerate(shardings)}
    for run in run_ranks(2, _on_rank, configs, tmp_path, BAD_STEP, timeout_s=850.0)[0].values():
        _assert_same(run, oracle)
    # the number of updates so far, which corrects its moments, comes back too
    whole, first = (_config(corpus, 2, shardings[0], stop_at=stop_at) for stop_at in (None, 2))
    uninterrupted = _train({"whole": whole}, tmp_path)["whole"]
    (tmp_path / "stopped").mkdir()
    for config in (first, whole):
        run_ranks(2, _moved, config, tmp_path / "stopped", None)
    expected, saved = (newest_tensors(of / "checkpoints") for of in (uninterrupted.directory, tmp_path / "stopped"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())


def _alone(sender: Any, config: TrainConfig) -> None:
    reports: list[StepReport] = []
    Trainer(config, report=reports.append).fit()
    sender.send([(report.loss, report.grad_norm) for report in reports])


def test_a_worker_alone_needs_no_group(corpus: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    seen = []
    for sharding in (None, {"stage": 3}):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_alone, args=(sender, _config(corpus, 1, sharding, steps=2)), daemon=True)
        process.start()
        sender.close()
        try:
            seen.append(receiver.recv())
        finally:
            process.kill()
            process.join()
    own, library = seen
    assert library == [pytest.approx(of_step, rel=1e-6) for of_step in own]


class Move(NamedTuple):
    """A stop of a checkpoint on its way."""

    workers: int
    sharding: dict[str, Any] | None
    is_trained: bool = False
    """Whether steps are made there; else it is loaded and saved again."""


JOURNEYS = {
    "there and back": [
        Move(2, None, is_trained=True),
        Move(3, {"stage": 3, "whole_below": 0}),
        Move(2, None),
        Move(2, {"stage": 1}, is_trained=True),
    ],
    "the others": [
        Move(2, {"stage": 2}, is_trained=True),
        Move(3, {"stage": 2, "offload": "optimizer"}),
        Move(1, {"stage": 1}),
        Move(4, {"stage": 3, "offload": "parameters", "whole_below": 200}),
        Move(3, None),
        Move(1, {"stage": 3}),
        Move(3, {"stage": 1}),
        Move(3, {"stage": 2, "offload": "optimizer"}, is_trained=True),
    ],
}


def _moved(rank: int, workers: int, config: TrainConfig, directory: Path, save_to: Path | None) -> dict[str, Tensor]:
    """Take over the newest checkpoint; save it again, or train on. Returns the parameters that the model computes with."""
    trainer = Trainer(config, directory=directory, resume=save_to is not None or config.stop_at is None)
    if save_to is None:
        trainer.fit()
    else:
        trainer.state.save(save_to, keep=1)
    return _model_parameters(trainer)


def _model_parameters(trainer: Trainer) -> dict[str, Tensor]:
    named = dict(trainer.built.model.named_parameters())
    sharding = trainer.config.layout.deepspeed
    if sharding is None or sharding.stage < 3:
        return {name: parameter.detach().clone() for name, parameter in named.items()}
    import deepspeed as library

    with library.zero.GatheredParameters(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("journey", ["there and back", pytest.param("the others", marks=pytest.mark.parity)])
def test_a_checkpoint_moves_between_engines_and_numbers_of_ranks_bit_for_bit(
    journey: str, corpus: Path, tmp_path: Path
) -> None:
    moves = JOURNEYS[journey]
    places = [tmp_path / str(number) for number in range(len(moves))]
    states: list[dict[str, Tensor]] = []
    for number, (workers, sharding, is_trained) in enumerate(moves):
        stop_at = 2 if number == 0 else None
        config = _config(corpus, workers, sharding, stop_at=stop_at, layout={"capacity": 600})
        source = places[max(0, number - 1)]
        source.mkdir(exist_ok=True)
        save_to = None if is_trained else places[number] / "checkpoints"
        of_ranks = run_ranks(workers, _moved, config, source, save_to)
        states.append(newest_tensors((source if is_trained else places[number]) / "checkpoints"))
        for name, parameter in itertools.chain.from_iterable(parameters.items() for parameters in of_ranks):
            assert torch.equal(parameter, states[-1][f"parameter.{name}"]), f"the model computes with another {name}"
    for before, after in itertools.pairwise(states[:-1]):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(tensor.abs().max() > 0 for name, tensor in states[0].items() if name.startswith("exp_avg_sq."))
    whole = _train({"whole": _config(corpus, 1, None, dtype="float64")}, tmp_path)["whole"]
    expected = newest_tensors(whole.directory / "checkpoints")
    for name, tensor in states[-1].items():
        assert relative_error(tensor.double(), expected[name]) <= 1e-5, name


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64, 1024])
def test_the_map_of_any_number_of_ranks_covers_every_tensor_once(stage: int, ranks: int) -> None:
    shapes = {"a": (7, 5), "norm": (7,), "b": (3, 4, 2), "bias": (1,), "c": (1, 1)}
    whole = shard_map(shapes, stage, ranks)
    whole.check()
    assert whole.num_bytes == 3 * 4 * (35 + 7 + 24 + 1 + 1)
    assert all(fragment.start < fragment.stop for fragment in fragments(shapes, stage, ranks))


def test_a_library_that_divides_otherwise_is_refused(two_ranks: Result) -> None:
    expected = r"this version of DeepSpeed gives rank 0 .* of .*, where elements \[\d+, \d+\) are expected"
    assert re.match(expected, two_ranks.refusal)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": {"tp": 2}}, r"ranks share the model: tp 2\. Set layout\.tp to 1"),
        ({"layout": {"pp": 2}}, r"ranks share the model: pp 2\. Set layout\.pp to 1"),
        (
            {"layout": {"tp": 2, "ep": 2}, "model": MODEL | {"moe": MIXTURE}},
            r"tp 2 x ep 2\. Set layout\.tp and layout\.ep to 1",
        ),
        ({"dtype": "float64"}, r"in float32 or bfloat16, but dtype is float64\. Set dtype to float32"),
        ({"optimizer": {"kind": "lamb"}}, r"optimizer\.kind is lamb.*Set optimizer\.kind to adamw"),
    ],
)
def test_what_the_library_cannot_do_is_refused(changes: dict[str, Any], message: str, corpus: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _config(corpus, 2, {"stage": 1}, **changes)


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        ({"stage": 2, "offload": "parameters"}, r"stage 2 keeps them whole on every rank\. Set stage to 3"),
        ({"adam": "deepspeed"}, r"but offload is none\. Set offload to optimizer"),
        ({"stage": 4}, r"Input should be 1, 2 or 3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sharding: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.model_validate({"sharding": {"kind": "deepspeed"} | sharding})


def test_a_missing_library_is_named_before_anything_starts(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(corpus, 2, {"stage": 1})
    check_layout(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineMissing, match=re.escape("Run `pip install evermesh[deepspeed]`")):
        check_layout(config)
    check_layout(_config(corpus, 2, None))


@pytest.mark.parametrize(("stage", "groups"), [(1, ()), (2, ((0, 1, 2),)), (3, ((0, 1, 2),))])
def test_ranks_keep_step_where_they_communicate_in_every_micro_batch(
    stage: int, groups: tuple[tuple[int, ...], ...]
) -> None:
    layout = Layout.model_validate({"hdp": 3, "sharding": {"kind": "deepspeed", "stage": stage}})
    assert layout.lock_step_groups == groups
    assert layout.runs_in_waves == bool(groups)
    assert layout.model_copy(update={"hdp": 1}).lock_step_groups == ()

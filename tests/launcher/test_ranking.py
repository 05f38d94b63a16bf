"""In which layout a job goes on with fewer nodes: the one with the least predicted time of all that it can have there."""

import signal
from pathlib import Path
from typing import Any

import pytest

from evermesh.fault.events import read_events
from evermesh.launcher.config import JobConfig
from evermesh.launcher.elastic import layouts_on
from evermesh.launcher.ranking import Ranking, choices, may_choose, rank, rank_all
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.layout.network import Network
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.parallelism.layout.rates import Hardware
from evermesh.parallelism.layout.sample import Batch
from evermesh.parallelism.layout.search import estimate_layout
from evermesh.parallelism.layout.throughput import Setup, planned
from evermesh.runtime.advice import device_of
from evermesh.runtime.cost import ELEMENT_BYTES
from tests.launcher.jobs import clean_losses, launched
from tests.launcher.test_elastic import ELASTIC, EXACT
from tests.launcher.test_flush import _nobody_comes_back
from tests.launcher.test_lost_nodes import _wait_protected

VOCABULARY = 1024
LENGTHS = ((200, 256, 31, 120, 256, 256, 90, 17), (256, 64, 64, 64, 256, 128, 200))
SMALL = {"hidden": 64, "layers": 4, "heads": 4, "kv_heads": 4, "ffn": 128}
LARGE = {"hidden": 2048, "layers": 16, "heads": 16, "kv_heads": 4, "ffn": 8192}


def _job(
    corpus: Path, *, model: dict[str, int] = SMALL, cost: dict[str, float] | None = None, **layout: Any
) -> JobConfig:
    data = {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 256, "batch_tokens": 1024}
    layout = {"capacity": 256, "pp": 2, "tp": 4} | layout
    train = {"steps": 6, "model": model, "data": data, "layout": layout, "cost": cost}
    return JobConfig.model_validate({"workers": 16, "nodes": 4, "min_nodes": 1, "train": train})


def _predicted_s(job: JobConfig, layout: Layout) -> tuple[float, bool]:
    """Seconds of a step on nominal CPUs, and whether it fits into memory: as ``evermesh layout`` has it, one at a time."""
    options = SearchOptions(device=device_of(job.train), element_bytes=ELEMENT_BYTES[job.train.dtype])
    topology, shape = options.device.topology(layout.world_size // 4, 4), job.train.model.shape(VOCABULARY)
    found = estimate_layout(shape, topology, LENGTHS, layout, options)
    return found.step.total, found.largest_capacity >= layout.capacity


def _planned_s(job: JobConfig, layout: Layout) -> float:
    """The same with every batch planned."""
    options = SearchOptions(device=device_of(job.train), element_bytes=ELEMENT_BYTES[job.train.dtype])
    network = Network(options.device.topology(layout.world_size // 4, 4))
    hardware = Hardware(network, options.device, options.precision, options.imbalance)
    setup = Setup.of(job.train.model.shape(VOCABULARY), layout, hardware)
    return planned(setup, [Batch(lengths) for lengths in LENGTHS]).total


def _degrees(layout: Layout) -> tuple[int, int, int]:
    return layout.pp, layout.hdp, layout.tp


def _ranked(job: JobConfig) -> dict[int, Ranking]:
    return {workers: rank(job, layouts, LENGTHS, VOCABULARY) for workers, layouts in choices(job).items()}


@pytest.mark.parametrize("model", [SMALL, LARGE])
def test_the_chosen_layout_has_the_least_predicted_time_of_all_that_fit(corpus: Path, model: dict[str, int]) -> None:
    job = _job(corpus, model=model)
    ranked = _ranked(job)
    assert ranked.keys() == {12, 8, 4}
    for workers, found in ranked.items():
        predicted = {layout: _predicted_s(job, layout) for layout in layouts_on(job, workers)}
        expected = sorted((seconds, number) for number, (seconds, fits) in enumerate(predicted.values()) if fits)
        assert [one.step_s for one in found.fastest] == pytest.approx([seconds for seconds, _ in expected])
        assert [one.layout for one in found.fastest] == [list(predicted)[number] for _, number in expected]
        assert found.seconds < 10, "a second alone"
    assert [one.fastest for one in _ranked(job).values()] == [one.fastest for one in ranked.values()]


def test_the_chosen_layout_is_nearly_the_fastest_by_plans_too(corpus: Path) -> None:
    job = _job(corpus)
    for workers, found in _ranked(job).items():
        times = {layout: _planned_s(job, layout) for layout in layouts_on(job, workers)}
        assert times[found.fastest[0].layout] < 1.05 * min(times.values())
        assert times[found.fastest[0].layout] < times[layouts_on(job, workers)[0]]


def test_the_first_layout_that_fits_need_not_be_the_fastest(corpus: Path) -> None:
    job = _job(corpus)
    for workers, found in _ranked(job).items():
        first, fastest = layouts_on(job, workers)[0], found.fastest[0]
        assert _degrees(fastest.layout) != _degrees(first)
        assert fastest.step_s < 0.9 * next(one.step_s for one in found.fastest if one.layout == first)
        assert fastest.layout.capacity == job.train.layout.capacity


def test_equals_stay_in_the_order_in_which_they_were_given(corpus: Path) -> None:
    job = _job(corpus)
    one = layouts_on(job, 8)[0]
    same = one.model_copy(update={"hot_experts": 1})  # of a model without experts: no time depends on it
    for layouts in ((one, same), (same, one)):
        assert tuple(found.layout for found in rank(job, layouts, LENGTHS, VOCABULARY).fastest) == layouts


def test_what_does_not_fit_into_memory_by_formula_is_left_out(corpus: Path) -> None:
    """8 GiB for each worker: a whole model of this size is too large for one."""
    job = _job(corpus, model=LARGE | {"layers": 24, "hidden": 4096, "ffn": 16384})
    found = _ranked(job)[8]
    assert len(found.fastest) < len(layouts_on(job, 8))
    assert all(_predicted_s(job, one.layout)[1] for one in found.fastest)


def test_measured_coefficients_count_instead_of_nominal_ones(corpus: Path) -> None:
    """On a device that is a thousand times slower, other things count than on a nominal one."""
    nominal = _ranked(_job(corpus))[8]
    slow = _ranked(_job(corpus, cost={"token_s": 1.0, "pair_s": 1e-4, "micro_batch_s": 1.0}))[8]
    assert slow.fastest[0].step_s > 100 * nominal.fastest[0].step_s
    assert slow.fastest[-1].step_s / slow.fastest[0].step_s != pytest.approx(
        nominal.fastest[-1].step_s / nominal.fastest[0].step_s, rel=1e-3
    )


def test_without_data_nothing_is_ranked_and_it_is_said_why(corpus: Path, tmp_path: Path) -> None:
    job = _job(tmp_path / "nowhere")
    found = rank_all(tmp_path / "job.yaml", job)
    assert found.rankings == ()
    assert "nowhere" in found.problem
    there = rank_all(tmp_path / "job.yaml", _job(corpus))
    assert [one.workers for one in there.rankings] == [12, 8, 4]


def test_there_is_no_choice_with_ranks_that_share_no_model_or_with_all_nodes(corpus: Path) -> None:
    assert may_choose(_job(corpus))
    assert not may_choose(_job(corpus, pp=1, tp=1))
    assert choices(_job(corpus, pp=1, tp=1)) == {}
    assert not may_choose(_job(corpus).model_copy(update={"min_nodes": None}))


def test_f9_a_job_shrinks_to_the_fastest_layout_and_computes_the_same_there(job_file: Path) -> None:
    """Two ranks that share a model are the first layout that fits one node; two that do not are faster."""
    shape = ("workers=4", "train.model.kv_heads=2", "train.layout.tp=2")
    with launched(job_file, *EXACT, *ELASTIC, *shape) as job:
        job.wait_training()
        job.wait(lambda: "layouts ranked" in job.events)
        _wait_protected(job, (0, 1), 3)
        with _nobody_comes_back(job, "node-1"):
            job.wait_training(2)
            step = len(job.losses)
            job.wait(lambda: len(job.losses) > step + 2)
            job.process.send_signal(signal.SIGTERM)
            code, stdout, stderr = job.end()
            assert code == 143, stderr
        told = {event.kind: event for event in read_events(job.run.events)}
        chosen = told["layout chosen"]
        assert chosen.text.startswith("2 workers go on as pp 1 x hdp 2 x tp 1, where a step should take ")
        assert "; pp 1 x hdp 1 x tp 2 would take " in chosen.text
        assert chosen.text in stdout
        first = layouts_on(job.run.config(), 2)[0]
        assert (first.tp, first.hdp) == (2, 1)
        layout = Layout.model_validate(told["started"].fields["layout"])
        assert (layout.world_size, layout.tp, layout.hdp) == (2, 1, 2)
        assert told["resumed"].fields["source"] == "memory"
        losses = job.losses
    expected = clean_losses(job_file, 100000, f"train.stop_at={len(losses)}", *EXACT, *shape, "train.snapshot=off")
    assert losses == pytest.approx(expected, rel=1e-9)

"""On how many nodes a job goes on, in which layout; and that it computes the same there."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from evermesh import checkpoint
from evermesh.fault.events import Event, read_events
from evermesh.fault.snapshot.keeper.area import area_of
from evermesh.fault.snapshot.keeper.slots import held_by
from evermesh.launcher.config import JobConfig
from evermesh.launcher.elastic import layouts_on, node_counts
from tests.launcher.jobs import Job, clean_losses, launched
from tests.launcher.test_flush import _nobody_comes_back, _wait_in_memory


def _job(corpus: Path, *, workers: int, nodes: int, least: int | None, heads: int = 4, **layout: Any) -> JobConfig:
    model = {"hidden": 16, "layers": 2, "heads": heads, "kv_heads": heads, "ffn": 32}
    data = {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 256, "batch_tokens": 1024}
    train = {"steps": 6, "model": model, "data": data, "layout": {"capacity": 256, **layout}}
    return JobConfig.model_validate({"workers": workers, "nodes": nodes, "min_nodes": least, "train": train})


def test_the_layout_of_fewer_nodes_keeps_its_replicas_whole_where_it_can(corpus: Path) -> None:
    job = _job(corpus, workers=16, nodes=4, least=1, tp=4)
    assert node_counts(job) == (4, 3, 2, 1)
    for count in node_counts(job):
        layout = layouts_on(job, 4 * count)[0]
        assert (layout.tp, layout.pp, layout.hdp) == (4, 1, count)
    assert layouts_on(job, 16) == (job.train.layout,)


def test_where_replicas_do_not_divide_the_workers_they_become_smaller(corpus: Path) -> None:
    job = _job(corpus, workers=8, nodes=4, least=1, tp=4)
    found = {count: [(one.tp, one.hdp) for one in layouts_on(job, 2 * count)] for count in node_counts(job)}
    assert found == {4: [(4, 2)], 3: [(2, 3), (1, 6)], 2: [(4, 1), (2, 2), (1, 4)], 1: [(2, 1), (1, 2)]}


def test_the_longest_sequence_must_find_room(corpus: Path) -> None:
    job = _job(corpus, workers=4, nodes=4, least=1, capacity=100)
    assert node_counts(job) == (4, 3), "256 tokens are more than 2 x 100"


def test_without_a_least_number_all_nodes_are_needed(corpus: Path) -> None:
    assert node_counts(_job(corpus, workers=4, nodes=4, least=None)) == (4,)
    assert node_counts(_job(corpus, workers=4, nodes=4, least=3)) == (4, 3)
    with pytest.raises(ValidationError, match="5 nodes at least, but the job has 4"):
        _job(corpus, workers=4, nodes=4, least=5)


EXACT = (
    "train.dtype=float64",
    "nodes=2",
    "train.layout.capacity=320",
    "train.data.batch_tokens=16384",
)  # slow steps
ELASTIC = (
    "train.steps=100000",
    "min_nodes=1",
    "shrink_after_s=1",
    "train.checkpoint.every=null",
    "train.snapshot.every=1",
)


def _trains_on(job: Job, steps: int = 2) -> None:
    step = len(job.losses)
    job.wait(lambda: len(job.losses) > step + steps)


def _stop(job: Job) -> list[Event]:
    """End the job as its user would; how its attempts were resumed."""
    job.process.send_signal(signal.SIGTERM)
    code, _, stderr = job.end()
    assert code == 143, stderr
    return [event for event in read_events(job.run.events) if event.kind == "resumed"]


def _is_as_undisturbed(job_file: Path, losses: list[float]) -> None:
    expected = clean_losses(job_file, 100000, f"train.stop_at={len(losses)}", *EXACT, "train.snapshot=off")
    assert losses == pytest.approx(expected, rel=1e-9)


def test_f9_a_job_shrinks_without_a_node_and_grows_back_with_it(job_file: Path) -> None:
    """Without a checkpoint: the memory of the lost node is read through its keeper, which lives."""
    with launched(job_file, *EXACT, *ELASTIC) as job:
        job.wait_training()
        _wait_in_memory(job, 3)
        with _nobody_comes_back(job, "node-1") as stopped:
            job.wait_training(2)
            assert {found.rank for found in job.client.status().ranks} == {0}
            _trains_on(job)
            for process in stopped:
                process.resume()
            job.wait(lambda: all(node.state == "ready" for node in job.client.status().nodes))
            job.kill_rank(0)
            job.wait_training(3)
            assert {found.rank for found in job.client.status().ranks} == {0, 1}
            _trains_on(job)
            resumed = _stop(job)
        assert "snapshot rebuilt" not in job.events, "it is all there"
        assert [event.fields["source"] for event in resumed] == ["memory"] * 2
        assert int(str(resumed[0].fields["bytes_received"])) > 0
        assert "on 1 workers" in resumed[0].text
        assert "of attempt 2, on 2 workers" in resumed[1].text, (
            "what the smaller attempt left, not what the two had before"
        )
        losses = job.losses
        assert not any(psutil.pid_exists(process.pid) for process in stopped)
    _is_as_undisturbed(job_file, losses)


@contextmanager
def _grown(job_file: Path) -> Iterator[Job]:
    """A job that trains on one of two nodes, the other of which comes back; nothing else happens to it."""
    with launched(job_file, *EXACT, *ELASTIC, "grow_after_s=1") as job:
        job.wait_training()
        _wait_in_memory(job, 3)
        with _nobody_comes_back(job, "node-1") as stopped:
            job.wait_training(2)
            _trains_on(job)
            area = area_of(job.run.directory, "node-0")  # it protects nobody now, and waits for nobody
            job.wait(
                lambda: any(held.record.generation == 2 and held.state == "committed" for held in held_by(area, 0)),
                20.0,
            )
            for process in stopped:
                process.resume()
            yield job


def test_a_job_on_fewer_nodes_takes_one_that_has_come_back_for_a_while_and_loses_no_step(job_file: Path) -> None:
    with _grown(job_file) as job:
        status = job.wait_training(3)
        assert {found.rank for found in status.ranks} == {0, 1}
        assert status.restarts == 1, "the lost node; growing is none"
        _trains_on(job)
        resumed = _stop(job)
        assert [(event.fields["source"], "on 2 workers" in event.text) for event in resumed] == [
            ("memory", False),
            ("memory", True),
        ]
        told = [event for event in read_events(job.run.events) if event.kind in ("regrouping", "stopped")]
        assert [event.kind for event in told] == ["regrouping", "stopped", "stopped"]
        assert told[0].text == ("2 of 2 nodes have been ready for 1 s (grow_after_s): going on with them instead of 1")
        assert resumed[1].step == told[1].step, "no step is trained again"
        assert len(checkpoint.checkpoints(job.run.checkpoints)) == 1, "only at the end"
        losses = job.losses
    _is_as_undisturbed(job_file, losses)


@pytest.mark.parity
def test_a_stop_between_two_attempts_writes_down_the_step_that_ranks_have_left(job_file: Path) -> None:
    with _grown(job_file) as job:
        job.wait(lambda: "stopped" in job.events)
        (left,) = [event for event in read_events(job.run.events) if event.kind == "stopped"]
        job.client.stop(signal.SIGTERM, grace_s=25.0)
        code, _, stderr = job.end()
        assert code == 143, stderr
        assert left.step is not None
        assert [found.step >= left.step for found in checkpoint.checkpoints(job.run.checkpoints)] == [True]

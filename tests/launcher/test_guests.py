"""A job that shrinks, or cannot go on, loses nothing that its stripes protect: survivors host guests, which keep what lost
nodes had until the smaller attempt has a snapshot of its own, or until it is in storage. No checkpoint is ever written before
the end."""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from evermesh import checkpoint
from evermesh.fault.snapshot.keeper.area import area_of
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.jobs import Job, clean_losses
from tests.launcher.test_cli import evermesh
from tests.launcher.test_flush import _nobody_comes_back
from tests.launcher.test_lost_nodes import WITHOUT_STORAGE, _members, _told, _wait_protected, job_of, lose

EXACT = ("train.dtype=float64", "train.layout.capacity=320", "train.data.batch_tokens=16384")  # slow steps
ELASTIC = ("min_nodes=2", "shrink_after_s=0.5")
GUEST = "guest-2-0-0"
"""The first one of the second attempt."""


@contextmanager
def _shrunk(job: Job, *names: str) -> Iterator[None]:
    """Nodes are gone with their memory, and nobody takes their places."""
    lose(job, *(int(name.removeprefix("node-")) for name in names))
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_nobody_comes_back(job, name))
        job.wait_training(2)
        yield


def _end(job: Job) -> None:
    job.process.send_signal(signal.SIGTERM)
    code, _, stderr = job.end()
    assert code == 143, stderr
    areas = [area_of(job.run.directory, name) for name in (*job.agents, GUEST)]
    until = time.monotonic() + 10
    while any(area.exists() for area in areas):
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(("nodes", "code", "places"), [
    (3, "2+1", (1,)),
    pytest.param(2, "1+1", (0,), marks=pytest.mark.parity),  # of rank 0; what is left has no stripe
    pytest.param(5, "3+2", (1, 3), marks=pytest.mark.parity),  # two of one stripe; the journal needs three
])  # fmt: skip
def test_f9_a_job_that_shrinks_goes_on_from_what_the_stripe_rebuilds_into_a_guest(
    job_file: Path, nodes: int, code: str, places: tuple[int, ...]
) -> None:
    left = nodes - len(places)
    of_job = (f"workers={nodes}", f"nodes={nodes}", f"min_nodes={left}", f"train.snapshot.code={code}")
    with job_of(job_file, *EXACT, *ELASTIC, *WITHOUT_STORAGE, *of_job) as job:
        lost = [f"node-{_members(job)[place]}" for place in places]
        protected = _wait_protected(job, tuple(range(nodes)), 3)
        killed_s, trained = time.time(), len(job.losses)
        with _shrunk(job, *lost):
            stepped_s = time.time()
            job.wait(lambda: len(_told(job, "resumed")) == 1)
            (resumed,), (rebuilt,) = _told(job, "resumed"), _told(job, "snapshot rebuilt")
            assert f"{GUEST} on node-" in rebuilt.text
            assert (rebuilt.step, resumed.fields["source"]) == (resumed.step, "memory")
            assert f"on {left} workers" in resumed.text
            assert int(str(resumed.fields["bytes_received"])) > 0
            assert protected <= (resumed.step or 0), "nothing that was protected is lost"
            assert not _told(job, "snapshot lost")
            step = len(job.losses)
            job.wait(lambda: len(job.losses) > step + 3)
            job.wait(lambda: not area_of(job.run.directory, GUEST).exists())
            job.wait(lambda: left == 1 or len(_told(job, "snapshots protected")) == 2)
            _end(job)
        times = {kind: f"{_told(job, kind)[0].time_s - killed_s:.2f}" for kind in ("snapshot rebuilt", "resumed")}
        print(f"seconds from the loss: {times}, next step {stepped_s - killed_s:.2f}; {trained=}, {resumed.step=}")
        losses = {report.step: report.loss for report in read_telemetry(job.run.telemetry)}
        assert losses.keys() >= set(range((resumed.step or 0) + 1, max(losses) + 1))
        assert len(checkpoint.checkpoints(job.run.checkpoints)) == 1, "only at the end"
    shape = (f"workers={nodes}", "train.snapshot=off", f"train.stop_at={max(losses)}")
    expected = dict(enumerate(clean_losses(job_file, 100000, *EXACT, *shape), 1))
    assert losses == pytest.approx({step: expected[step] for step in losses}, rel=1e-9)


def test_where_no_guest_can_be_had_a_job_that_shrinks_goes_on_from_storage_and_says_why(job_file: Path) -> None:
    with job_of(job_file, *EXACT, *ELASTIC, *WITHOUT_STORAGE) as job, ExitStack() as stack:
        job.client.save()
        job.wait_checkpoint()
        (saved,) = checkpoint.checkpoints(job.run.checkpoints)
        _wait_protected(job, (0, 1, 2), saved.step + 1)
        for number in range(2):  # for each snapshot that is in memory
            area = area_of(job.run.directory, f"guest-2-{number}-0")
            area.touch()
            stack.callback(area.unlink)
        with _shrunk(job, f"node-{_members(job)[2]}"):
            (lost,), (resumed,) = _told(job, "snapshot lost"), _told(job, "resumed")
            assert lost.text.count("no keeper can be started for it") == 2
            assert not _told(job, "snapshot rebuilt")
            assert resumed.step == saved.step
            assert resumed.fields.get("source") != "memory"
            step = len(job.losses)
            job.wait(lambda: len(job.losses) > step + 1)
            stack.close()
            _end(job)


@pytest.mark.parity
@pytest.mark.parametrize(("nodes", "code", "place"), [
    (2, "1+1", 0),  # of rank 0
    (3, "2+1", 1),
])  # fmt: skip
def test_f10_a_job_that_waited_in_vain_writes_down_what_only_the_stripe_can_rebuild_and_is_resumed_from_there(
    job_file: Path, nodes: int, code: str, place: int
) -> None:
    """States are divided among all ranks, so a part of them was nowhere but on the machine that is gone with its memory."""
    of_job = (f"workers={nodes}", f"nodes={nodes}", "join_timeout_s=25", f"train.snapshot.code={code}")
    with job_of(job_file, *EXACT, *WITHOUT_STORAGE, *of_job) as job:
        protected = _wait_protected(job, tuple(range(nodes)), 3)
        name = f"node-{_members(job)[place]}"
        lose(job, int(name.removeprefix("node-")))
        with _nobody_comes_back(job, name):
            code_of_end, _, stderr = job.end()
        assert code_of_end == 75, stderr
        (rebuilt,), (flushed,) = _told(job, "snapshot rebuilt"), _told(job, "flushed")
        assert "guest-1-end-0-0 on node-" in rebuilt.text
        assert flushed.step == rebuilt.step
        assert protected <= (flushed.step or 0), "nothing that was protected is lost"
        assert [one.step for one in checkpoint.checkpoints(job.run.checkpoints)] == [flushed.step]
        assert stderr.rstrip().splitlines()[-1].startswith(f"The newest checkpoint is step-{flushed.step:08}")
        assert not area_of(job.run.directory, "guest-1-end-0-0").exists()
        trained, last = len(job.losses), (flushed.step or 0) + 5
        changes = (f"train.stop_at={last}", "train.snapshot.code=auto", "join_timeout_s=600")
        options = ("--workers", "1", "--nodes", "1", *(part for change in changes for part in ("--set", change)))
        resumed = evermesh("resume", job.run.directory, *options)
        assert resumed.returncode == 0, resumed.stderr
        losses = {report.step: report.loss for report in read_telemetry(job.run.telemetry)}
        assert losses.keys() == set(range(1, max(trained, last) + 1))
    shape = (f"workers={nodes}", "train.snapshot=off", f"train.stop_at={max(losses)}")
    expected = dict(enumerate(clean_losses(job_file, 100000, *EXACT, *shape), 1))
    assert losses == pytest.approx(expected, rel=1e-9)


def test_f10_where_no_guest_can_be_had_the_last_words_say_why_and_which_checkpoint_there_is(job_file: Path) -> None:
    of_job = ("workers=2", "nodes=2", "restarts=0")
    with job_of(job_file, *WITHOUT_STORAGE, *of_job) as job, ExitStack() as stack:
        job.client.save()
        job.wait_checkpoint()
        (saved,) = checkpoint.checkpoints(job.run.checkpoints)
        _wait_protected(job, (0, 1), saved.step + 1)
        for number in range(2):  # for each snapshot that is in memory
            area = area_of(job.run.directory, f"guest-1-end-{number}-0")
            area.touch()
            stack.callback(area.unlink)
        lose(job, _members(job)[1])
        code, _, stderr = job.end()
        assert code == 1, stderr
        (lost,) = _told(job, "snapshot lost")
        assert lost.text.count("no keeper can be started for it") == 2
        assert not _told(job, "flushed")
        assert " was in memory, but could not be written to storage: step " in stderr
        assert stderr.count("no keeper can be started for it") == 2
        assert stderr.rstrip().splitlines()[-1].startswith(f"The newest checkpoint is step-{saved.step:08}; go on from")
        assert [one.step for one in checkpoint.checkpoints(job.run.checkpoints)] == [saved.step]

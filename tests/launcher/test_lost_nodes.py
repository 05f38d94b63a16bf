"""Jobs that lose nodes, with the memory of these, go on from what the other nodes of the stripe can rebuild: no checkpoint
is ever written before the end."""

import hmac
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from evermesh import checkpoint
from evermesh.fault.events import Event, read_events
from evermesh.fault.snapshot.keeper.area import area_of, identity_in
from evermesh.fault.snapshot.keeper.parity import protected_in
from evermesh.launcher.controller.work import launch_of
from tests.launcher.jobs import Job, clean_losses, launched

COMPARED = 30
MIB = 1 << 20
ENDLESS = ("train.steps=100000", "workers=3", "train.snapshot.every=1")
WITHOUT_STORAGE = ("train.checkpoint.every=null",)


def _assert_told_to_nobody(job: Job) -> None:
    """Neither the token nor the secret that is made of it."""
    token = (job.run.directory / "token").read_text().strip()
    launch = launch_of(job.client.status().started_s)
    secret = hmac.digest(token.encode(), f"evermesh stripes\0{launch}".encode(), "sha256")
    paths = [path for path in job.run.directory.rglob("*") if path.is_file() and path.name != "token"]
    paths += [Path(f"/proc/{pid}/environ") for pid in job.pids.values()]
    paths += [area_of(job.run.directory, f"node-{node}") / "standing" for node in range(3)]
    for path in paths:
        for word in (token.encode(), secret, secret.hex().encode()):
            assert word not in path.read_bytes(), path


@pytest.fixture(scope="module")
def expected(job_file_of_module: Path) -> list[float]:
    return clean_losses(job_file_of_module, 100000, f"train.stop_at={COMPARED}", "workers=3", "train.snapshot=off")


@contextmanager
def job_of(job_file: Path, *overrides: str) -> Iterator[Job]:
    """A job of three nodes with one worker each; it trains, and its snapshots are protected."""
    with launched(job_file, *ENDLESS, "nodes=3", *overrides) as job:
        job.wait_training()
        job.wait(lambda: bool(_told(job, "snapshots protected")))
        told = job.client.status().snapshot
        assert told is not None
        assert told.protection == "protected"
        yield job


def _told(job: Job, kind: str) -> list[Event]:
    return [event for event in read_events(job.run.events) if event.kind == kind] if job.run.events.is_file() else []


def _members(job: Job) -> tuple[int, ...]:
    """The nodes of the latest attempt, by rank."""
    names = [entry.fields["nodes"] for entry in job.journal if entry.kind == "attempt"][-1]
    assert isinstance(names, list)
    return tuple(int(str(name).removeprefix("node-")) for name in names)


def lose(job: Job, *nodes: int) -> None:
    """What the end of machines looks like from outside: agents, workers, keepers and memory are gone, all at once."""
    processes = []
    for node in nodes:
        agent = psutil.Process(job.agents[f"node-{node}"])
        keeper = identity_in(area_of(job.run.directory, f"node-{node}"))
        assert keeper is not None
        processes += [agent, *agent.children(recursive=True), psutil.Process(keeper.pid)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)  # nobody starts anything again
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for node in nodes:
        shutil.rmtree(area_of(job.run.directory, f"node-{node}"))


def _wait_protected(job: Job, nodes: tuple[int, ...], beyond: int) -> int:
    """Wait until all these nodes protect a step behind this one; the step."""

    def steps() -> list[int]:
        areas = [area_of(job.run.directory, f"node-{node}") for node in nodes]
        return [max((one.version.step for one in protected_in(area)), default=0) for area in areas]

    job.wait(lambda: min(steps()) > beyond)
    return min(steps())


def _end(job: Job) -> str:
    job.wait(lambda: len(job.losses) >= COMPARED)
    job.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = job.end()
    assert code == 143, stderr
    return stdout


def _assert_from_memory(job: Job, stdout: str, attempts: int, losses: list[float]) -> None:
    assert [event.fields["source"] for event in _told(job, "resumed")] == ["memory"] * (attempts - 1)
    assert len(_told(job, "snapshot rebuilt")) == attempts - 1
    assert not _told(job, "snapshot lost")
    assert job.losses[:COMPARED] == losses
    assert len(checkpoint.checkpoints(job.run.checkpoints)) == 1, "only at the end"
    assert "which is in memory" in stdout


def test_f8_a_lost_node_is_rebuilt_into_the_memory_of_a_spare_and_protected_again(
    job_file: Path, expected: list[float]
) -> None:
    with job_of(job_file, "spares=1", *WITHOUT_STORAGE) as job:
        first = _members(job)  # the agent that came last is the spare
        (spare,) = {0, 1, 2, 3} - set(first)
        _wait_protected(job, first, 3)
        lose(job, first[1])
        job.wait(lambda: len(_told(job, "resumed")) == 1)
        (resumed,), (rebuilt,) = _told(job, "resumed"), _told(job, "snapshot rebuilt")
        assert rebuilt.step == resumed.step
        assert f"node-{spare}" in rebuilt.text
        assert "code 2+1" in rebuilt.text
        assert _members(job) == (first[0], spare, first[2])
        _wait_protected(job, _members(job), resumed.step or 0)
        job.wait(lambda: len(_told(job, "snapshots protected")) == 2)
        lose(job, first[0])  # of rank 0 and the rendezvous: the node lost first, with empty memory, takes its place
        job.wait(lambda: len(_told(job, "resumed")) == 2)
        _assert_from_memory(job, _end(job), 3, expected)


def test_what_all_nodes_hold_is_not_coded_and_a_lost_node_has_it_again_from_copies(job_file: Path) -> None:
    """Every node has one of three experts alone, and all else with its moments as the others have it."""
    shape = (
        "train.model.hidden=64",
        "train.model.moe={experts: 3, top_k: 2, ffn: 64}",
        "train.layout.ep=3",
        "train.layout.sharding.states=1",
    )
    losses = clean_losses(job_file, 100000, f"train.stop_at={COMPARED}", "workers=3", "train.snapshot=off", *shape)
    with job_of(job_file, *shape, *WITHOUT_STORAGE) as job:
        (told,) = _told(job, "snapshots protected")
        data, coded, sent, parity = (
            int(str(told.fields[f"{name}_bytes"])) for name in ("data", "coded", "sent", "parity")
        )
        assert f"Of {data:,} bytes {coded:,} are coded" in told.text
        assert 0.2 * data < coded == sent < 0.7 * data
        assert parity == 3 * MIB, "one chunk on every node"
        _wait_protected(job, (0, 1, 2), 3)
        lose(job, 1)
        job.wait(lambda: len(_told(job, "resumed")) == 1)
        job.wait(lambda: len(_told(job, "snapshots protected")) == 2)
        _assert_from_memory(job, _end(job), 2, losses)


@pytest.mark.parity
@pytest.mark.parametrize(("nodes", "code", "lost"), [(3, "1+2", (1, 2)), (4, "1+1", (0, 1))])
def test_f12_f14_two_lost_nodes_come_back_of_one_stripe_with_two_parity_parts_and_of_two_with_one(
    job_file: Path, nodes: int, code: str, lost: tuple[int, int]
) -> None:
    shape = (f"workers={nodes}", f"nodes={nodes}")
    losses = clean_losses(job_file, 100000, f"train.stop_at={COMPARED}", *shape, "train.snapshot=off")
    with job_of(job_file, f"train.snapshot.code={code}", *shape, *WITHOUT_STORAGE) as job:
        _wait_protected(job, tuple(range(nodes)), 3)
        lose(job, *lost)
        job.wait(lambda: len(_told(job, "resumed")) == 1)
        _assert_from_memory(job, _end(job), 2, losses)


@pytest.mark.parity
def test_f11_more_lost_nodes_than_the_code_covers_cost_a_read_of_storage_and_are_named(
    job_file: Path, expected: list[float]
) -> None:
    with job_of(job_file, *WITHOUT_STORAGE) as job:
        job.client.save()
        job.wait_checkpoint()
        (saved,) = checkpoint.checkpoints(job.run.checkpoints)
        _wait_protected(job, (0, 1, 2), saved.step)
        lose(job, 0, 2)
        job.wait(lambda: len(_told(job, "resumed")) == 1)
        (lost,), (resumed,) = _told(job, "snapshot lost"), _told(job, "resumed")
        assert "stripe 0 (node-0, node-1, node-2; code 2+1) has lost what node-0, node-2 had" in lost.text
        assert "1 lost nodes" in lost.text
        assert resumed.step == saved.step
        assert resumed.fields.get("source") != "memory"
        job.wait(lambda: len(job.losses) >= COMPARED)
        job.process.send_signal(signal.SIGTERM)
        assert job.end()[0] == 143
        assert job.losses[:COMPARED] == expected


def test_f6_a_keeper_that_died_is_told_as_degraded_and_its_stripe_protects_the_next_snapshots(job_file: Path) -> None:
    with job_of(job_file, *WITHOUT_STORAGE) as job:
        first = identity_in(area_of(job.run.directory, "node-2"))
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        job.wait(lambda: bool(_told(job, "snapshots degraded")))
        job.wait(lambda: len(_told(job, "snapshots protected")) == 2)
        assert "node-2" in _told(job, "snapshots degraded")[0].text
        assert job.run.state().attempt == 1
        _wait_protected(job, (0, 1, 2), len(job.losses))
        _assert_told_to_nobody(job)
        job.process.send_signal(signal.SIGTERM)
        assert job.end()[0] == 143
    until = time.monotonic() + 10
    while any(area_of(job.run.directory, f"node-{node}").exists() for node in range(3)):
        assert time.monotonic() < until
        time.sleep(0.02)

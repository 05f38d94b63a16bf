"""The phase in which guests take the places of lost nodes, with agents that are only told of: what may fail in it."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evermesh.fault.events import Event, read_events
from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.controller.reach import Reach
from evermesh.launcher.controller.work import launch_of
from evermesh.launcher.messages import HostGuest, InMemory, KeeperAt, ProtectedPart, Rebuild, Report, SnapshotPart
from evermesh.runtime.telemetry import SnapshotReport
from tests.cluster import run_ranks
from tests.fault.snapshot.keepers import keeper_of, kill_keeper
from tests.fault.snapshot.members import SECRET
from tests.fault.snapshot.test_snapshots import _take
from tests.launcher.controller.test_remembering import REPORT
from tests.launcher.controller.worlds import World, world

MAP = "a" * 32
PORTIONS = tuple(((rank, 8, 8, 8),) for rank in range(3))


def _memory(job: World, rank: int, steps: tuple[int, ...]) -> InMemory:
    parts = [SnapshotPart(rank=rank, generation=1, step=step, shard_map=MAP, world_size=3) for step in steps]
    known = [
        ProtectedPart(
            version=(1, step, MAP), stripe="stripe-0", member=rank, code="2+1", portions=PORTIONS, coded_bytes=()
        )
        for step in steps
    ]
    launch = launch_of(job.controller.record.started_s)
    return InMemory(launch=launch, parts=tuple(parts), protected=tuple(known))


@contextmanager
def _about_to_shrink(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Iterator[World]:
    """Three nodes, of which one is lost with its memory, and nobody takes its place."""
    values = {"workers": 3, "nodes": 3, "spares": 0, "min_nodes": 2, "shrink_after_s": 2.0}
    with world(**(values | changes)) as job:
        monkeypatch.setattr(job, "replace", lambda node: False)
        job.settle(2)
        for rank, name in enumerate(job.controller.life.nodes if job.controller.life else ()):
            agent = job.agents[name]
            assert agent.ranks is not None
            agent.ranks.step, agent.memory = 9, _memory(job, rank, (8, 9))
        job.settle(1)
        for agent in job.agents.values():
            agent.cut()  # and each tells all again
        job.settle(1)
        job.agents["node-1"].die()
        job.settle(1)
        yield job


def _told(job: World, kind: str) -> list[Event]:
    return [event for event in read_events(job.run.events) if event.kind == kind]


def _guests(job: World) -> dict[str, tuple[int, ...]]:
    return {
        guest: tuple(part.rank for part in found.parts)
        for agent in job.agents.values()
        for guest, found in agent.guests.items()
        if agent.is_alive
    }


def _reached(keepers: list[KeeperAt]) -> Version | None:
    reach, until_s = Reach(keepers, "launch", SECRET), time.monotonic() + 20
    while not reach.is_known:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    return reach.newest


def _generation(job: World) -> set[int | None]:
    return {agent.ranks.generation if agent.ranks else None for agent in job.agents.values() if agent.is_alive}


@pytest.mark.parametrize("last", [(11, SnapshotReport(committed=1)), (110, SnapshotReport())])
def test_ranks_start_when_a_guest_has_what_was_lost_and_it_ends_with_the_first_complete_snapshot_or_without_one(
    monkeypatch: pytest.MonkeyPatch, last: tuple[int, SnapshotReport]
) -> None:
    with _about_to_shrink(monkeypatch) as job:
        job.settle(3)
        (rebuilt,) = _told(job, "snapshot rebuilt")
        assert rebuilt.step == 9
        assert _generation(job) == {2}
        assert _guests(job) == {"guest-2-0-0": (1,)}
        assert job.controller.life is not None
        assert job.controller.life.remembered == 9
        agent = job.agents["node-0"]
        for (step, snapshot), left in (((10, SnapshotReport()), 1), (last, 0)):
            told = replace(REPORT, step=step, snapshot=snapshot)
            agent.say(Report(generation=2, values=json.loads(told.to_json())))
            job.settle(0.5)
            assert len(_guests(job)) == left


@pytest.mark.parametrize("free", [{"node-0": 4, "node-2": 6}, {"node-0": 7}, {"node-0": 9, "node-2": 1}])
def test_the_host_is_where_most_shared_memory_is_left(monkeypatch: pytest.MonkeyPatch, free: dict[str, int]) -> None:
    """All have 8 bytes of memory; one that says nothing of the file system counts with these."""
    with _about_to_shrink(monkeypatch) as job:
        for name, num_bytes in free.items():
            job.agents[name].shared_memory_free_bytes = num_bytes
        job.settle(3)
        (rebuilt,) = _told(job, "snapshot rebuilt")
        best = max(("node-0", "node-2"), key=lambda name: min(8, free.get(name, 8)))
        assert f"guest-2-0-0 on {best} keeps" in rebuilt.text


def test_where_the_newest_cannot_be_rebuilt_an_older_snapshot_is_and_the_first_guest_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _about_to_shrink(monkeypatch) as job:
        for agent in job.agents.values():
            agent.cannot_rebuild = {9}
        job.settle(3)
        assert [event.step for event in _told(job, "snapshot rebuilt")] == [8]
        assert _generation(job) == {2}
        assert list(_guests(job).values()) == [(1,)]


@pytest.mark.parametrize("how", ["cannot", "silent"])
def test_where_none_can_be_rebuilt_ranks_start_without_and_it_is_told_why(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with _about_to_shrink(monkeypatch) as job:
        for agent in job.agents.values():
            agent.cannot_rebuild = {8, 9}
            agent.ignores = (HostGuest,) if how == "silent" else ()
        job.settle(3)
        assert _generation(job) == ({1} if how == "silent" else {2})
        job.settle(45)
        (lost,) = _told(job, "snapshot lost")
        assert "step 9" in lost.text
        assert "step 8" in lost.text
        assert ("no room" if how == "cannot" else "took too long") in lost.text
        assert not _told(job, "snapshot rebuilt")
        assert _generation(job) == {2}
        assert _guests(job) == {}
        assert job.controller.life is not None
        assert job.controller.life.began_at is None


def test_what_ranks_would_find_anyway_is_not_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    with _about_to_shrink(monkeypatch) as job:
        reach = Reach((), "", b"")
        reach.newest = Version(1, 9, MAP)
        monkeypatch.setattr(job.controller._memory, "reach", reach)
        job.settle(3)
        assert not _told(job, "snapshot rebuilt")
        assert _generation(job) == {2}


def _settle_to_the_end(job: World) -> None:
    until_s = time.monotonic() + 20
    while job.controller.state != "failed":
        assert time.monotonic() < until_s
        job.settle(0.25)
        time.sleep(0.005)  # the thread that asks keepers has a clock of its own


def test_f10_before_a_job_ends_that_cannot_go_on_guests_have_what_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with _about_to_shrink(monkeypatch, min_nodes=None, join_timeout_s=5.0) as job:
        job.settle(3)
        assert job.controller.state == "waiting"
        assert _guests(job) == {}, "the node may still come"
        _settle_to_the_end(job)
        (rebuilt,) = _told(job, "snapshot rebuilt")
        assert rebuilt.step == 9
        assert _generation(job) == {1}
        assert _guests(job) == {"guest-1-end-0-0": (1,)}
        assert job.run.state().exit_code == 75


@pytest.mark.parametrize("how", ["cannot", "silent"])
def test_f10_where_no_guest_can_be_had_the_job_ends_with_the_reasons(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    with _about_to_shrink(monkeypatch, min_nodes=None, join_timeout_s=5.0) as job:
        for agent in job.agents.values():
            agent.cannot_rebuild = {8, 9}
            agent.ignores = (HostGuest,) if how == "silent" else ()
        _settle_to_the_end(job)
        assert not _told(job, "snapshot rebuilt")
        assert _guests(job) == {}
        assert job.run.state().exit_code == 75
        error = job.run.state().error or ""
        assert "2 of 3 nodes were there after 5 s" in error
        assert "Step 9 was in memory, but could not be written to storage: step 9: " in error
        assert error.count("no room" if how == "cannot" else "took too long") == 2, "of each snapshot in memory"


def test_f10_a_node_that_comes_in_time_ends_what_was_begun_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with _about_to_shrink(monkeypatch, min_nodes=None, join_timeout_s=5.0) as job:
        for agent in job.agents.values():
            agent.ignores = (Rebuild,)
        until_s = time.monotonic() + 20
        while not _guests(job):
            assert time.monotonic() < until_s
            job.settle(0.25)
            time.sleep(0.005)
        job.start(["node-1"])
        while job.controller.generation == 1:
            job.settle(0.25)
        for agent in job.agents.values():
            agent.ignores = ()
        job.settle(25)  # orders that were ignored are given again
        assert _generation(job) == {2}
        assert _guests(job) == {}
        assert [event.step for event in _told(job, "snapshot rebuilt")] == [9], "into the node itself"


def test_keepers_that_live_on_are_found_without_their_agents(tmp_path: Path) -> None:
    nodes = (0, 0, 1, 1)
    with ExitStack() as stack:
        keepers = [stack.enter_context(keeper_of(tmp_path, f"node-{node}", secret=SECRET)) for node in range(2)]
        run_ranks(4, _take, str(tmp_path), nodes, (4, 9), 1)
        addresses = [KeeperAt(host=one.address.host, port=one.address.port) for one in keepers if one.address]
        found = _reached(addresses)
        assert found is not None
        assert found.step == 9
        kill_keeper(keepers[1].area)
        assert _reached(addresses) is None, "nobody has copies of what these ranks held"


def test_a_controller_that_is_started_again_meanwhile_has_the_guests_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    with _about_to_shrink(monkeypatch) as job:
        for agent in job.agents.values():
            agent.ignores = (Rebuild,)
        while job.controller.generation == 1:
            job.settle(0.25)
        job.revive()
        for agent in job.agents.values():
            agent.ignores = ()
        job.settle(5)
        assert _generation(job) == {2}
        assert [event.step for event in _told(job, "snapshot rebuilt")][-1] == 9
        assert (1,) in _guests(job).values()

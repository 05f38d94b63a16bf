"""Members with their disks and sockets: who is let in, what outlives them, who is elected and who is not."""

import http.client
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from evermesh.launcher.errors import NotReplicated, Superseded
from evermesh.launcher.succession.copy import read_copy
from evermesh.launcher.succession.leader import Leader, Views
from evermesh.launcher.succession.office import Mandate
from evermesh.launcher.succession.peers import Peers
from evermesh.launcher.succession.protocol import Confirm, Peek, Seat, View, Vote
from evermesh.launcher.succession.replica import DiskMemory, Replica
from evermesh.launcher.succession.server import ReplicaServer
from evermesh.launcher.succession.standing import Standing

TOKEN = "a-token-of-the-test"


class Member:
    """One node, as its agent makes it; it can be killed and started again."""

    def __init__(self, folder: Path, node: str) -> None:
        self.folder, self.node = folder / node / "memory", node
        self.mandates: list[Mandate] = []
        self.lost_s: float | None = None
        """Monotonic clock: since when it hears no controller."""
        self.start()

    def lose_controller(self) -> None:
        self.lost_s = time.monotonic()

    def start(self) -> None:
        self.memory = DiskMemory(self.folder, TOKEN)
        self.replica = Replica(self.memory)
        self.server = ReplicaServer(self.replica, self.node, "127.0.0.1", TOKEN)
        self.replica.hears = lambda: self.lost_s is None
        self.replica.is_reviving = lambda: bool(self.mandates)
        self.standing = Standing(
            self.replica,
            self.server.seat,
            self.folder / "copy.jsonl",
            TOKEN,
            missing_s=lambda: None if self.lost_s is None else time.monotonic() - self.lost_s,
            start=self.mandates.append,
        )
        self.standing.begin()

    def kill(self) -> None:
        self.standing.close()
        self.server.close()
        self.memory.close(job_is_over=False)


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[Member]]:
    found = [Member(tmp_path, f"node-{number}") for number in range(3)]
    with ExitStack() as stack:
        for member in found:
            stack.callback(member.kill)
        yield found


def views_of(term: int = 1, before: View | None = None) -> Views:
    members = before.members if before else ()
    view = View(
        launch=1, term=term, number=0, leader="node-0", machine="m", controller=f"http://{term}", members=members
    )
    return Views(view=view, before=before)


def led(members: list[Member], lines: int = 3) -> Leader:
    """A controller of term 1 that all take part with, and that has written some lines."""
    leader = Leader(views_of(), [], Peers(TOKEN), 2, lambda _: None)
    leader.tend([member.server.seat for member in members], "node-0")
    for number in range(lines):
        leader.commit(f"line {number}")
    return leader


def wait(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_committed_line_is_on_the_disks_of_two_nodes_beside_that_of_the_controller(members: list[Member]) -> None:
    led(members)
    assert [len(read_copy(member.folder / "copy.jsonl")) for member in members] == [0, 3, 3]


def test_who_does_not_show_the_token_is_not_answered(members: list[Member]) -> None:
    seat = members[0].server.seat
    assert Peers(TOKEN).ask({seat: Peek()})
    assert Peers("another").ask({seat: Vote(launch=0, term=99)}) == {}
    assert members[0].replica.word.promised == 0


@pytest.mark.parametrize("token", ["", "x", "\xff\xfe", TOKEN[:-1]])
def test_odd_tokens_are_refused_as_wrong_ones(members: list[Member], token: str) -> None:
    connection = http.client.HTTPConnection(members[0].server.seat.url.removeprefix("ws://"), timeout=10)
    keys = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "A" * 22 + "==",
    }
    connection.request("GET", "/", headers={**keys, "Authorization": f"Bearer {token}"})
    assert connection.getresponse().status == 401
    connection.close()


def test_a_member_that_was_killed_keeps_its_promise_and_one_of_another_run_has_none(members: list[Member]) -> None:
    led(members)
    one = members[1]
    assert one.replica.answer(Vote(launch=1, term=7)).accepted
    one.kill()
    one.start()
    assert not one.replica.answer(Vote(launch=1, term=7)).accepted
    assert not one.replica.answer(Confirm(launch=1, term=6)).accepted
    assert one.replica.answer(Confirm(launch=1, term=7)).accepted
    one.memory.close(job_is_over=False)
    other = DiskMemory(one.folder, "token of another run")
    assert (other.word.promised, other.word.view, len(other.chain)) == (0, None, 0)
    other.close(job_is_over=True)
    one.memory = DiskMemory(one.folder, TOKEN)


def test_two_agents_of_a_node_never_share_what_it_has_promised(members: list[Member]) -> None:
    with pytest.raises(BlockingIOError):
        DiskMemory(members[0].folder, TOKEN)


def test_a_folder_that_others_may_write_into_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chmod(shared, 0o777)
    with pytest.raises(PermissionError, match="journal_folder"):
        DiskMemory(shared / "memory", TOKEN)


def test_when_the_head_node_is_gone_exactly_one_is_elected_with_the_whole_journal(members: list[Member]) -> None:
    leader = led(members)
    members[0].standing.close()
    members[0].server.close()
    for member in members[1:]:
        member.lose_controller()
    wait(lambda: any(member.mandates for member in members))
    time.sleep(4.0)  # the other one has had its turn by then
    (mandate,) = [mandate for member in members for mandate in member.mandates]
    assert mandate.term == 2
    assert mandate.node in ("node-1", "node-2")
    assert mandate.view == leader.view
    assert read_copy(mandate.copy_path) == ["line 0", "line 1", "line 2"]
    with pytest.raises((Superseded, NotReplicated)):
        leader.commit("of the old one")


def test_a_holder_whose_copy_was_cut_short_leaves_the_office_to_the_other(members: list[Member]) -> None:
    led(members)
    short = members[1]
    short.kill()
    content = (short.folder / "copy.jsonl").read_bytes()
    (short.folder / "copy.jsonl").write_bytes(content[:-10])
    short.start()
    for member in members:
        member.lose_controller()
    wait(lambda: any(member.mandates for member in members))
    assert [mandate.node for member in members for mandate in member.mandates] == ["node-2"]


def test_one_of_three_is_never_elected_and_promises_nothing_for_itself(members: list[Member]) -> None:
    led(members)
    for member in members[:2]:
        member.kill()
    members[2].lose_controller()
    time.sleep(4.0)
    assert members[2].mandates == []
    assert members[2].replica.word.promised == 1
    for member in members[:2]:
        member.start()


def test_nobody_stands_while_another_hears_the_controller(members: list[Member]) -> None:
    led(members)
    for member in members[1:]:  # as behind a cut: node-0 hears it
        member.lose_controller()
    time.sleep(4.0)
    assert [member.mandates for member in members] == [[], [], []]
    assert [member.replica.word.promised for member in members] == [1, 1, 1]


def test_a_dead_holder_is_replaced_and_stops_nothing(members: list[Member]) -> None:
    leader = led(members)
    members[1].kill()
    leader.commit("without node-1")
    assert members[2].memory.chain.lines[-1] == "without node-1"
    assert members[0].memory.chain.lines[-1] == "without node-1"
    assert set(leader.view.holders) == {members[0].server.seat.identity, members[2].server.seat.identity}
    members[1].start()
    leader.tend([member.server.seat for member in members], "node-0")
    assert members[1].server.seat in leader.view.members  # it listens elsewhere, and is the same member


def test_a_controller_that_hears_less_than_half_decides_nothing(members: list[Member]) -> None:
    leader = led(members)
    for member in members[1:]:
        member.kill()
    with pytest.raises(NotReplicated, match="1 of 3 agents"):
        leader.confirm()
    with pytest.raises(NotReplicated):
        leader.commit("of a minority")
    for member in members[1:]:
        member.start()
        leader.meet(member.server.seat)
    leader.confirm()
    leader.commit("of all")
    assert members[1].memory.chain.lines[-1] == "of all"


def test_a_stale_controller_learns_from_any_member_that_it_is_superseded(members: list[Member]) -> None:
    old = led(members)
    for member in members[1:]:
        assert member.replica.answer(Vote(launch=1, term=2)).accepted
    new = Leader(views_of(2, old.view), [f"line {number}" for number in range(3)], Peers(TOKEN), 2, lambda _: None)
    new.confirm()
    new.commit("of the new one")
    for act in (old.confirm, lambda: old.commit("of the old one")):
        with pytest.raises(Superseded, match="term 2"):
            act()
    assert "of the old one" not in [line for member in members for line in member.memory.chain.lines]


def test_a_seat_says_who_is_asked_and_where(members: list[Member]) -> None:
    seat = members[0].server.seat
    assert Seat.model_validate_json(seat.model_dump_json()) == seat
    assert seat.url.startswith("ws://127.0.0.1:")


@contextmanager
def _unreachable() -> Iterator[str]:
    """Where a connection is neither taken nor refused, as behind a cut cable."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # nobody accepts these, and there is no room for more
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        host, port = listener.getsockname()
        yield f"ws://{host}:{port}"


def test_one_that_is_out_of_reach_keeps_nobody_from_answering(members: list[Member]) -> None:
    with _unreachable() as url:
        seat = members[0].server.seat
        gone = seat.model_copy(update={"url": url, "identity": "gone"})
        peers = Peers(TOKEN)
        for _ in range(2):  # the second time the others have been asked before
            answers = peers.ask({gone: Peek(), **{member.server.seat: Peek() for member in members}})
            assert set(answers) == {member.server.seat.identity for member in members}
        assert peers.responsive([gone, seat]) == [seat]
        peers.close()

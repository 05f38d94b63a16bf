"""What the controller knows of its nodes: who was heard, what proves that ranks live, who is whose agent."""

from typing import Any

import pytest

from evermesh.launcher.controller import nodes as nodes_module
from evermesh.launcher.controller.nodes import Nodes, node_status
from evermesh.launcher.messages import Hello


class Clock:
    """A clock that the test sets."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(nodes_module, "time", clock)
    return clock


def hello(name: str, pid: int = 7, **fields: Any) -> Hello:
    return Hello(node=name, host="here", address="127.0.0.1", pid=pid, **fields)


@pytest.fixture
def nodes(clock: Clock) -> Nodes:
    """Two nodes that were heard at 100 s."""
    found = Nodes()
    for name in ("node-0", "node-1"):
        found.expect(name)
        found.greet(hello(name))
    return found


def test_a_node_is_ready_when_its_agent_said_hello(clock: Clock) -> None:
    nodes = Nodes()
    nodes.expect("node-0")
    clock.now_s += 1000
    assert nodes.judge(nodes["node-0"], None, 0.0) == "joining"
    nodes.greet(hello("node-0"))
    assert nodes.judge(nodes["node-0"], None, 0.0) == "ready"


def test_an_agent_that_ended_before_it_joined_is_lost(clock: Clock) -> None:
    nodes = Nodes()
    nodes.expect("node-0")
    assert nodes.judge(nodes["node-0"], False, 0.0) == "lost"


def test_two_steps_since_a_node_fell_silent_prove_that_its_ranks_live(nodes: Nodes, clock: Clock) -> None:
    silent = nodes["node-1"]
    clock.now_s += 2.5
    nodes["node-0"].hear()
    nodes.note_step(1)  # it may have been nearly over when node-1 fell silent
    assert nodes.judge(silent, None, 0.1) == "lost"
    nodes.note_step(2)
    assert nodes.judge(silent, None, 0.1) == "cut off"
    clock.now_s += 2.5
    assert nodes.judge(silent, None, 0.1) == "lost"


def test_a_step_that_was_seen_before_proves_nothing(nodes: Nodes, clock: Clock) -> None:
    nodes.note_step(5)
    clock.now_s += 2.5
    for _ in range(9):
        nodes.note_step(5)
        nodes.note_step(4)
    assert nodes.judge(nodes["node-1"], None, 0.1) == "lost"


def test_only_its_agent_makes_a_node_that_is_cut_off_ready_again(nodes: Nodes, clock: Clock) -> None:
    adopted = nodes["node-1"]
    adopted.state = "cut off"  # as an earlier controller knew it; never heard by this one
    assert nodes.judge(adopted, True, 0.0) == "cut off"
    nodes.greet(hello("node-1"))
    assert nodes.judge(adopted, True, 0.0) == "ready"


def test_a_lost_node_stays_lost_until_an_agent_says_hello(nodes: Nodes, clock: Clock) -> None:
    nodes["node-1"].state = "lost"
    nodes["node-1"].hear()
    assert nodes.judge(nodes["node-1"], True, 0.0) == "lost"
    assert nodes.greet(hello("node-1", pid=8))
    assert nodes.states()["node-1"] == "ready"


@pytest.mark.parametrize(("pid", "is_new"), [(7, False), (8, True)])
def test_another_process_is_another_agent(nodes: Nodes, pid: int, is_new: bool) -> None:
    assert nodes.greet(hello("node-1", pid)) is is_new


def test_an_expected_node_has_no_agent_yet(nodes: Nodes) -> None:
    nodes.expect("node-1")
    assert not nodes.greet(hello("node-1", 9))


def test_nodes_are_named_in_the_order_of_their_numbers() -> None:
    nodes = Nodes()
    for name in ("node-10", "node-9", "node-0"):
        nodes.expect(name)
    assert list(nodes.states()) == ["node-0", "node-9", "node-10"]


def test_what_is_sent_without_a_connection_is_dropped(nodes: Nodes) -> None:
    nodes["node-0"].send(hello("node-0"))
    assert nodes["node-0"].outbox is None


def test_the_lease_that_is_told_runs_out(nodes: Nodes, clock: Clock) -> None:
    clock.now_s += 0.5
    assert node_status(nodes["node-0"], (0, 1), False).lease_left_s == 1.5
    clock.now_s += 9
    assert node_status(nodes["node-0"], (), True).lease_left_s == 0.0

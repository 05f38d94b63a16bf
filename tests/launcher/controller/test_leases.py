"""Whether a node lives, from when it was last heard and what else is known."""

import pytest

from evermesh.launcher.controller.leases import LEASE_S, NodeSigns, node_state
from evermesh.launcher.controller.machine import ROOT_CAUSE_WAIT_S


@pytest.mark.parametrize(
    ("silent_s", "proof_s", "process_lives", "step_s", "expected"),
    [
        (0.0, 0.0, True, 0.0, "ready"),
        (LEASE_S - 0.01, LEASE_S - 0.01, None, 0.0, "ready"),
        (0.0, 0.0, False, 0.0, "lost"),  # its process is gone, whatever it said a moment ago
        (LEASE_S, LEASE_S, None, 0.0, "lost"),  # no steps are known: nothing says that its ranks live
        (LEASE_S, LEASE_S - 0.01, None, 0.0, "cut off"),  # the others finished steps with it
        (100.0, 0.5, None, 0.1, "cut off"),  # as long as steps are finished
        (100.0, 0.5, True, 0.1, "cut off"),
        (100.0, 2.1, True, 0.1, "lost"),  # its process lives, but nothing moves
        (5.9, 5.9, True, 0.1, "cut off"),  # it may wait for a processor
        (6.0, 6.0, True, 0.1, "lost"),
        (5.0, 5.0, None, 3.0, "cut off"),  # steps are long: two of them may pass
        (6.0, 6.0, None, 3.0, "lost"),
        (29.0, 29.0, None, 600.0, "cut off"),  # half a minute is the longest doubt
        (30.0, 30.0, None, 600.0, "lost"),
    ],
)
def test_a_node_is(silent_s: float, proof_s: float, process_lives: bool | None, step_s: float, expected: str) -> None:
    assert node_state(NodeSigns(silent_s, proof_s, process_lives, step_s)) == expected


def test_a_lost_node_is_known_before_the_patience_with_those_who_lost_their_peer_ends() -> None:
    assert LEASE_S < ROOT_CAUSE_WAIT_S

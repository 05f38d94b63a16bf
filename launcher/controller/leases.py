"""Whether a node lives: a pure function of when it was last heard and of what else is known."""

from dataclasses import dataclass

from evermesh.launcher.controller.machine import NodeState

LEASE_S = 2.0
"""Seconds that a node counts as alive after it was last heard."""
_LIVING_S = 3 * LEASE_S
"""Likewise while its agent's process is known to live: it waits for a processor, as where ranks start on a busy machine."""
_LONGEST_DOUBT_S = 30.0


@dataclass(frozen=True, slots=True)
class NodeSigns:
    """What is known of a node that has joined."""

    silent_s: float
    """Since it was last heard, seconds."""
    proof_s: float
    """Since the last proof that its ranks live, seconds: it was heard, or all ranks finished a step together that cannot
    have ended before it fell silent."""
    process_lives: bool | None
    """Whether its agent's process lives; None where that cannot be seen from here, or it is stopped."""
    step_s: float
    """Time of a step, seconds; 0 while unknown."""


def node_state(signs: NodeSigns) -> NodeState:
    """``ready``, ``cut off`` or ``lost``.

    Ranks work in step: while steps are finished without a word from a node, its ranks live, and only its way to the
    controller is cut. Without steps the doubt lasts for a lease, for two steps where those are longer, and for three leases
    where the process of its agent lives.
    """
    if signs.process_lives is False:
        return "lost"
    if signs.silent_s < LEASE_S:
        return "ready"
    doubt_s = min(_LONGEST_DOUBT_S, max(LEASE_S, 2 * signs.step_s))
    may_be_busy = signs.process_lives is True and signs.silent_s < _LIVING_S
    return "cut off" if may_be_busy or signs.proof_s < doubt_s else "lost"

"""Random plans of all planners in great number: the verifier accepts every one, with nodes, speeds and certificate.

``make soak-planner`` proves a million of them in two processes; PLANS says how many, FIRST from which seed on. The other
tests include a slice.
"""

import multiprocessing
import os
import time
from collections import Counter

import pytest

from evermesh.parallelism import PlanInvalid, verify_plan
from evermesh.parallelism.proof.packed import is_right
from tests.parallelism.planned import draw

_CHUNK = 250
"""Plans that a process proves before it reports."""


def prove(first: int, number: int) -> tuple[Counter[str], float, float]:
    """Plan and prove so many cases: plans by form, and the seconds of planning and of proof.

    Raises:
        PlanInvalid: naming the seed.
    """
    counts: Counter[str] = Counter()
    planning_s = proof_s = 0.0
    for seed in range(first, first + number):
        case = draw(seed)
        started = time.perf_counter()
        plan = case.plan()
        planned = time.perf_counter()
        try:
            verify_plan(plan, case.lengths, case.layout, cost=case.cost, pool=case.pool)
            if not is_right(plan, case.layout, case.pool):
                raise PlanInvalid("right only piece by piece, which is too slow for large plans.")
        except PlanInvalid as error:
            raise PlanInvalid(f"draw({seed}): {error}") from error
        proof_s += time.perf_counter() - planned
        planning_s += planned - started
        layout = case.layout
        counts["pipelines" if layout.pp > 1 else "lock-step" if layout.runs_in_waves else "free"] += 1
    return counts, planning_s, proof_s


def _prove_chunk(first: int) -> tuple[Counter[str], float, float]:
    return prove(first, _CHUNK)


def test_some_hundred_random_plans_are_accepted() -> None:
    counts, _, _ = prove(10**7, 200)
    assert min(counts[kind] for kind in ("free", "lock-step", "pipelines")) > 0


@pytest.mark.parametrize("seed", [207, 61472, 102166])
def test_sequences_in_turn_may_share_copies_that_hide(seed: int) -> None:
    """One micro-batch hides the copies of its short documents under the attention of a long one."""
    assert prove(seed, 1)[0].total() == 1


def test_neighbours_of_a_ring_across_uneven_nodes_may_divide_heads() -> None:
    """Four ranks of nodes of 3, 3 and 2 in pairs, though no pair divides a node of 3."""
    assert prove(117429, 1)[0].total() == 1


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_million_random_plans_are_accepted() -> None:
    wanted, first = int(os.environ.get("PLANS", "1000000")), int(os.environ.get("FIRST", "0"))
    counts: Counter[str] = Counter()
    planning_s, proof_s, started = 0.0, 0.0, time.monotonic()
    with multiprocessing.get_context("forkserver").Pool(2) as processes:
        for done in processes.imap_unordered(_prove_chunk, range(first, first + wanted, _CHUNK)):
            counts, planning_s, proof_s = counts + done[0], planning_s + done[1], proof_s + done[2]
            print(
                f"\r{counts.total()} of {wanted} plans accepted: {dict(counts)}, planning {planning_s:.0f} s, "
                f"proof {proof_s:.0f} s, {time.monotonic() - started:.0f} s passed",
                end="",
                flush=True,
            )
    assert counts.total() >= wanted

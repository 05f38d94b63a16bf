"""Faults of some kinds in real jobs are found, at once, and nobody else is named; the whole suite is ``make faults``."""

import pytest

from tests.fault.suite.cases import FAULTS, INNOCENTS, SIZES, draw
from tests.fault.suite.running import run, warm_up


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    warm_up()


@pytest.mark.parametrize(
    ("kind", "ranks", "seed"),
    [
        ("SIGKILL", 4, 0),
        ("SIGSTOP", 2, 1),
        ("data loader", 4, 0),
        ("skipped", 2, 0),
        ("other dtype", 2, 2),
        ("clock jump", 2, 0),
        ("healthy", 2, 1),
    ],
)
def test_what_is_wrong_with_a_real_job_is_found_and_nothing_else_is_said(
    native_tap: object, kind: str, ranks: int, seed: int
) -> None:
    outcome = run(draw(kind, ranks, seed))
    assert outcome.is_found, f"{outcome.seen}; {outcome.logs}"
    assert not outcome.wrong, outcome.wrong


def test_a_case_is_a_function_of_its_kind_size_and_seed() -> None:
    for kind in (*FAULTS, *INNOCENTS):
        for size in SIZES:
            case = draw(kind, size, 5)
            assert case == draw(kind, size, 5)
            assert case.job.world_size == size
            assert case.fault is None or 0 <= case.fault.rank < size

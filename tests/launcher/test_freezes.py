"""Which ranks count as frozen: the table. Whatever may take long is never taken for a freeze."""

from dataclasses import replace
from typing import Any

import pytest

from evermesh.fault.events import Finding
from evermesh.launcher.config import HangConfig
from evermesh.launcher.freezes import frozen, left_alone
from evermesh.launcher.messages import RankBeat

DEFAULT = HangConfig()


def beat(rank: int, **changes: Any) -> RankBeat:
    """A rank that waits for the others at the end of step 8, whose steps take milliseconds."""
    values: dict[str, Any] = {"step": 7, "step_s": 0.01, "compute_s": 0.01, "longest_s": 0.02, "point": "sum"}
    return RankBeat(**{"rank": rank, "pid": 100 + rank} | values | changes)


QUIET = {"idle_s": 3.1}
HANGS = (beat(0, **QUIET), beat(1, point="train", **QUIET))

FINE = [
    ("nobody is silent", (beat(0), beat(1))),
    ("not long enough", (beat(0, idle_s=2.9), beat(1, idle_s=2.9))),
    ("one computes, and the other waits for it", (beat(0, idle_s=500.0), beat(1, point="train"))),
    ("the first step", (beat(0, idle_s=500.0, step=0, longest_s=0.0), beat(1, idle_s=500.0, step=0, longest_s=0.0))),
    ("a step of a minute", (beat(0, idle_s=60.0, longest_s=60.0), beat(1, idle_s=60.0, longest_s=1.0))),
    ("one rank has not begun", (beat(0, **QUIET),)),
    ("stopped for a moment", (beat(0), beat(1, stopped_s=1.9, idle_s=1.9))),
    *[
        (f"{point}", (beat(0, idle_s=500.0), beat(1, idle_s=500.0, point=point)))
        for point in ("start-up", "data", "compile", "evaluate", "checkpoint")
    ],
]


@pytest.mark.parametrize(("situation", "beats"), FINE, ids=[name for name, _ in FINE])
def test_it_is_no_freeze_that(situation: str, beats: tuple[RankBeat, ...]) -> None:
    assert frozen(beats, 2, DEFAULT, sees_work=True) is None, situation


def test_a_rank_that_hangs_is_the_one_that_the_others_wait_for() -> None:
    found = frozen(HANGS, 2, DEFAULT, sees_work=True)
    assert found == (1, "hangs in step 8: no rank has computed anything for 3.1 s (limit 3.0 s)", ())


SAYS = Finding(kind="hang", rank=0, text="rank 0 never entered it", confidence=0.98)


def test_whom_the_records_name_is_named_though_others_have_not_come_either() -> None:
    found = frozen(HANGS, 2, DEFAULT, [SAYS], sees_work=True)
    told = "hangs in step 8: no rank has computed anything for 3.1 s (limit 3.0 s); rank 0 never entered it"
    assert found == (0, told, ())


def test_the_ends_of_a_link_that_is_cut_are_named_both_and_after_a_rank_that_is_named() -> None:
    cut = Finding(kind="communication hang", link=(0, 2), text="what 2 sends does not arrive at 0", confidence=0.9)
    found = frozen(HANGS, 2, DEFAULT, [cut], sees_work=True)
    assert found is not None
    assert (found.rank, found.others) == (0, (2,))
    assert found.how.startswith("hangs in step 8, as does rank 2: ")
    assert frozen(HANGS, 2, DEFAULT, [cut, SAYS], sees_work=True) == frozen(HANGS, 2, DEFAULT, [SAYS], sees_work=True)
    assert frozen(HANGS, 2, DEFAULT, [cut.model_copy(update={"link": None})], sees_work=True) == frozen(
        HANGS, 2, DEFAULT, sees_work=True
    ), "it names nobody"


@pytest.mark.parametrize("changes", [{"kind": "slow rank"}, {"confidence": 0.5}, {"rank": None}])
def test_records_that_do_not_say_who_hangs_change_nothing(changes: dict[str, Any]) -> None:
    findings = [SAYS.model_copy(update=changes)]
    assert frozen(HANGS, 2, DEFAULT, findings, sees_work=True) == frozen(HANGS, 2, DEFAULT, sees_work=True)
    fine = [beat(0), beat(1)]
    assert frozen(fine, 2, DEFAULT, [SAYS], sees_work=True) is None


def test_where_nobody_has_come_to_the_sum_or_all_have_every_rank_is_named() -> None:
    for point in ("sum", "train"):
        found = frozen([beat(rank, point=point, **QUIET) for rank in (2, 0, 1)], 3, DEFAULT, sees_work=True)
        assert found is not None
        assert found.rank == 0
        assert "hangs in step 8, as may ranks 1, 2: " in found.how


def test_a_rank_that_is_a_step_behind_is_named_though_others_are_at_no_sum() -> None:
    found = frozen((beat(0, point="train", **QUIET), beat(1, step=6, **QUIET)), 2, DEFAULT, sees_work=True)
    assert found is not None
    assert found.rank == 1


def test_the_limit_follows_the_longest_of_the_last_steps() -> None:
    slow = (beat(0, longest_s=60.0, idle_s=299.0), beat(1, longest_s=1.0, idle_s=299.0))
    assert frozen(slow, 2, DEFAULT, sees_work=True) is None
    slower = [replace(found, idle_s=300.0) for found in slow]
    assert frozen(slower, 2, DEFAULT, sees_work=True) is not None


def test_where_work_cannot_be_seen_only_a_stopped_rank_is_found() -> None:
    assert frozen(HANGS, 2, DEFAULT, sees_work=False) is None
    stopped = (beat(0, idle_s=2.0), beat(1, idle_s=2.0, stopped_s=2.0))
    assert frozen(stopped, 2, DEFAULT, sees_work=False) == (1, "has been stopped for 2.0 s (SIGSTOP)", ())


@pytest.mark.parametrize("point", ["start-up", "checkpoint", "train"])
def test_a_stopped_rank_is_found_whatever_it_was_doing(point: str) -> None:
    found = frozen((beat(0, point="data"), beat(1, point=point, step=0, stopped_s=2.5)), 2, DEFAULT, sees_work=True)
    assert found is not None
    assert found.rank == 1


@pytest.mark.parametrize("point", ["data", "checkpoint", "evaluate", "sum"])
def test_on_a_node_that_nobody_reaches_a_rank_that_waits_anywhere_is_ended_later_outside_of_a_step(point: str) -> None:
    limit_s = 3.0 if point == "sum" else 9.0
    waits = beat(1, idle_s=limit_s + 0.1, point=point)
    assert left_alone([waits], DEFAULT, limit_s - 0.1) is None, "a controller may come back"
    assert left_alone([beat(1, idle_s=limit_s - 0.1, point=point)], DEFAULT, 500.0) is None
    found = left_alone([waits], DEFAULT, limit_s + 0.1)
    assert found is not None
    assert found.rank == 1
    assert f"for {limit_s + 0.1:.1f} s (limit {limit_s:.1f} s)" in found.how


def test_on_a_node_that_nobody_reaches_who_works_or_starts_goes_on() -> None:
    waits, works = beat(0, idle_s=500.0, point="data"), beat(1, point="data")
    assert left_alone([waits, works], DEFAULT, 500.0) is None
    assert left_alone([beat(0, idle_s=500.0, step=0, longest_s=0.0, point="start-up")], DEFAULT, 500.0) is None
    assert left_alone([], DEFAULT, 500.0) is None

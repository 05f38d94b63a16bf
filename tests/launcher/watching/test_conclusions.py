"""When something that detectors say is concluded, when it is over, whose rings are read, and what is expected of a step."""

from collections.abc import Sequence

import numpy as np
import pytest

from evermesh.fault.detectors import kernels, kinds
from evermesh.fault.detectors.summaries import RankSummary
from evermesh.fault.events import Finding
from evermesh.fault.isolation.meanings import MEANINGS, meaning_of
from evermesh.fault.recorder.record import RECORD
from evermesh.fault.recorder.trace import RankTrace
from evermesh.launcher.controller.watching.conclusions import Conclusions
from evermesh.launcher.controller.watching.expected import Expected
from evermesh.launcher.controller.watching.rings import RingReading
from evermesh.launcher.controller.watching.work import Work
from evermesh.launcher.watching.messages import PlannedStep, PlannedWork, ReadRings


def _hang(rank: int | None = 1, waited_s: float = 1.0) -> Finding:
    return Finding(kind=kinds.HANG, rank=rank, group="world", text=f"since {waited_s} s", confidence=0.98)


_SLOW = Finding(kind=kinds.SLOW_RANK, rank=2, confidence=0.9)


def test_kinds_are_those_of_the_detectors() -> None:
    known = {value for name, value in vars(kinds).items() if name.isupper() and isinstance(value, str)}
    parts = (kinds.EXPLAINING, kinds.SLOWNESS, kinds.HARMLESS)
    assert known == frozenset().union(*parts)
    assert sum(map(len, parts)) == len(known), "each is one of them"
    assert known - kinds.HARMLESS <= MEANINGS.keys()
    assert {kind for kind in known if meaning_of(kind).source == "hang"} <= kinds.EXPLAINING
    assert {kind for kind in known if meaning_of(kind).source in ("lateness", "network")} <= kinds.SLOWNESS


def test_what_names_no_way_is_concluded_when_none_is_found_soon() -> None:
    vague = Finding(kind=kinds.COMMUNICATION_HANG, group="world", confidence=0.9)
    cut = vague.model_copy(update={"link": (0, 1)})
    known = Conclusions()
    assert known.take([vague], 0.0).begun == ()
    assert known.take([cut], 1.0).begun == (cut,)
    assert known.take([cut], 4.0).over == ()
    lasting = Conclusions()
    assert [bool(lasting.take([vague], now_s).begun) for now_s in (0.0, 0.5, 1.0, 1.5, 2.0)] == [False] * 3 + [
        True,
        False,
    ]


def test_a_hang_is_concluded_at_once_and_told_once_with_its_newest_numbers() -> None:
    known = Conclusions()
    assert known.take([_hang()], 0.0).begun == (_hang(),)
    assert known.take([_hang(waited_s=1.5)], 0.5) == ((), ())
    assert list(known.findings) == [_hang(waited_s=1.5)]
    assert known.take([_hang(), _hang(rank=0)], 1.0).begun == (_hang(rank=0),)
    assert known.take([], 1.5) == ((), ())
    begun, over = known.take([], 2.5)
    assert (begun, {finding.rank for finding, _ in over}) == ((), {0, 1})
    assert not known.findings
    assert known.take([_hang()], 3.0).begun == (_hang(),), "another one"


def test_slowness_has_to_last_and_a_pause_of_it_is_no_end() -> None:
    known = Conclusions()
    begun = [known.take([_SLOW], now_s).begun for now_s in np.arange(0.0, 4.0, 0.5).tolist()]
    assert [bool(found) for found in begun] == [False] * 6 + [True, False]
    assert known.take([], 6.0).over == ()
    assert known.take([_SLOW], 6.5) == ((), ())
    assert known.take([], 12.0).over == ((_SLOW, 12.0),)


def test_slowness_that_comes_and_goes_is_not_concluded() -> None:
    known = Conclusions()
    said = [known.take([_SLOW] if second % 6 < 3 else [], float(second)) for second in range(40)]
    assert set(said) == {((), ())}


def test_with_the_end_of_a_generation_its_findings_are_over() -> None:
    known = Conclusions()
    known.take([_hang(), _SLOW], 1.0)
    assert known.end(4.0).over == ((_hang(), 3.0),)
    assert not known.findings


def _trace(rank: int) -> RankTrace:
    return RankTrace(rank, "node-0", 7, np.zeros(0, RECORD), {}, {}, 3, "train", 1, 0)


def test_rings_are_asked_for_once_and_then_ever_more_rarely() -> None:
    orders: list[ReadRings] = []
    rings = RingReading(5, orders.append)
    asked_s = []
    for now_s in np.arange(0.0, 40.0, 0.5).tolist():
        before = len(orders)
        rings.suspect((1, 0), now_s)
        if len(orders) > before:
            asked_s.append(now_s)
            assert rings.complete(now_s) is None
            rings.take(_trace(0))
            rings.take(_trace(9))
            assert rings.complete(now_s) is None
            rings.take(_trace(1))
            found = rings.complete(now_s)
            assert found is not None
            assert sorted(trace.rank for trace in found) == [0, 1]
    assert asked_s == [0.0, 2.0, 6.0, 14.0, 30.0]
    assert orders[0] == ReadRings(generation=5, ranks=(0, 1), records=4096)
    rings.suspect((2,), 40.0)
    assert orders[-1].ranks == (2,), "others are read at once"


def test_of_many_ranks_few_records_are_read_and_those_that_do_not_come_are_not_awaited_forever() -> None:
    orders: list[ReadRings] = []
    rings = RingReading(5, orders.append)
    rings.suspect(range(12_288), 0.0)
    assert orders[0].records * 12_288 <= 1 << 20
    rings.take(_trace(3))
    assert rings.complete(1.0) is None
    found = rings.complete(3.5)
    assert found is not None
    assert [trace.rank for trace in found] == [3]


def _planned(step: int, *work_s: float, tp: int = 1, pp: int = 1) -> PlannedWork:
    ones = (1,) * len(work_s)
    zeros = (0,) * len(work_s)
    of_step = PlannedStep(
        alone_s=work_s, in_rings_s=zeros, tokens=ones, micro_batches=ones, rings=zeros, makespan_s=max(work_s)
    )
    return PlannedWork(generation=1, pp=pp, tp=tp, steps={step: of_step})


def test_all_ranks_that_share_a_sequence_have_its_work() -> None:
    expected = Expected(8)
    expected.take(_planned(3, 1.0, 0.0, tp=2, pp=2))
    expected.take(_planned(4, 1.0, 2.0))
    ranks = dict.fromkeys((0, 1, 4, 5), 1.0)
    assert Work(8).explained_s(expected.plans) == {(rank, 3): of for rank, of in ranks.items()}


def test_a_step_may_take_as_long_as_those_before_and_longer_if_it_has_more_to_do() -> None:
    expected = Expected(2)
    assert expected.step_s() is None
    for step in range(1, 80):
        expected.take(_planned(step, 1e-3, 2e-3))
        expected.note(step, 0.5 + 0.001 * (step % 3))
    assert expected.step_s() == pytest.approx(0.5, abs=0.01)
    expected.take(_planned(80, 1e-2, 2e-2))
    assert expected.step_s() == pytest.approx(5.0, abs=0.1)
    expected.note(80, 5.0)
    expected.take(_planned(81, 1e-4, 2e-4))
    assert expected.step_s() == pytest.approx(0.5, abs=0.01)
    assert len(expected.plans) == 64


def _summary(rank: int, seconds: Sequence[float]) -> RankSummary:
    """A rank that computed so long in steps 1, 2, ..., and is in the next one."""
    of_step = np.zeros((len(seconds) + 1, kernels.STEP_COLUMNS), np.int64)
    of_step[:-1, kernels.TRAIN_NS], of_step[:, kernels.COUNT] = np.array(seconds) * 1e9, 5
    nothing = np.zeros((0, 3), np.int64)
    return RankSummary(_trace(rank), -1, nothing, 1, of_step, np.zeros(len(of_step), np.uint64), nothing, 5, 0)


@pytest.mark.parametrize(
    "coefficients", [(3.0, 3.0, 0.0, 0.0, 0.0, 0.0), (3.0, 0.1, 0.0, 0.0, 0.0, 0.01), (0.0, 0.0, 2e-4, 0.01, 0.1, 0.02)]
)
def test_what_plans_explain_is_measured_by_all_ranks_and_who_is_slow_stands_out(coefficients: Sequence[float]) -> None:
    random, ranks, steps = np.random.default_rng(3), 4, 30
    names = ("alone_s", "in_rings_s", "tokens", "micro_batches", "rings")
    given = random.uniform(0.1, 1.0, (steps, ranks, 5)) * (1.0, 1.0, 1000.0, 8.0, 4.0)
    given[:, :, 2:] = given[:, :, 2:].astype(int)
    expected = Expected(ranks)
    for step, of_ranks in enumerate(given.transpose(0, 2, 1).tolist(), 1):
        values = dict(zip(names, of_ranks, strict=True)) | {"makespan_s": 1.0}
        expected.take(PlannedWork(generation=1, pp=1, tp=1, steps={step: PlannedStep.model_validate(values)}))
    measured = (given @ np.array(coefficients[:5]) + coefficients[5]) * random.normal(1.0, 0.02, (steps, ranks))
    measured[:, 2] *= 1.5
    work = Work(ranks)
    work.note([_summary(rank, measured[:, rank].tolist()) for rank in range(ranks)])
    explained = work.explained_s(expected.plans)
    ratio = [
        np.median([measured[step - 1, rank] / explained[rank, step] for step in range(1, steps)]) for rank in range(4)
    ]
    others = np.median([ratio[rank] for rank in (0, 1, 3)])
    assert ratio[2] / others == pytest.approx(1.5, rel=0.1)
    assert np.ptp([ratio[rank] for rank in (0, 1, 3)]) < 0.1 * others

"""A rank that leaves the order of a step without anybody waiting for it."""

from collections.abc import Sequence

import numpy as np
import pytest

from evermesh.fault.detectors import diagnose, kinds
from evermesh.fault.detectors.joining import join, survey
from evermesh.fault.detectors.reordering import strays_of
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import Fault, Mismatch, Swap
from tests.fault.detectors.windows import watched

_SHAPE = JobShape(dp=2, tp=4, steps=14)
_SWAP = Swap(5, 6, "tp", nth=-1)
"""The last sum of a step over four ranks and what follows, over two: nobody waits in a circle."""


def _suspicious(traces: Sequence[RankTrace]) -> list[tuple[int, ...]]:
    return [seen.suspicious for seen in watched(traces, windows=48) if seen.suspicious]


def test_it_is_named_with_what_was_due_and_its_ring_is_asked_for_with_those_of_some_like_it() -> None:
    traces = generate(_SHAPE, [_SWAP]).traces
    [found] = diagnose(traces).findings
    assert (found.kind, found.rank, found.step) == (kinds.REORDERED, 5, 6)
    assert "entered reduce_scatter of group dp1 in step 6 where all_reduce of group tp1 was due" in found.text
    asked = _suspicious(traces)
    assert asked
    assert set(asked) == {(0, 1, 2, 3, 5)}
    read = [trace for trace in traces if trace.rank in asked[0]]
    assert [(one.kind, one.rank) for one in diagnose(read).findings] == [(kinds.REORDERED, 5)]


@pytest.mark.parametrize(
    ("faults", "shape"),
    [
        ([], _SHAPE),
        ([_SWAP], JobShape(dp=2, tp=2, pp=2, steps=14)),
        ([Swap(rank, 6, "tp", nth=-1) for rank in (1, 5)], _SHAPE),
        ([Swap(5, step, "tp", nth=-1) for step in range(6, 15)], _SHAPE),
    ],
    ids=["healthy", "of a stage", "two", "for good"],
)
def test_only_one_of_several_that_do_the_same_and_only_for_a_step_is_named(
    faults: Sequence[Fault], shape: JobShape
) -> None:
    found = diagnose(generate(shape, list(faults)).traces).findings
    expected = [kinds.REORDERED] if shape.pp == 2 else []
    assert [one.kind for one in found] == expected


def test_another_size_is_a_mismatch_and_no_order() -> None:
    found = diagnose(generate(_SHAPE, [Mismatch(5, 6, num_bytes=4096)]).traces).findings
    assert kinds.REORDERED not in {one.kind for one in found}


def test_batches_that_differ_from_step_to_step_say_nothing_of_order() -> None:
    traces = generate(_SHAPE).traces
    random = np.random.default_rng(3)
    for trace in traces:
        trace.records["num_bytes"] = random.integers(1, 4, len(trace.records)) * 1024
    assert not list(strays_of(survey(join(traces))))

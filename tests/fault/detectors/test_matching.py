"""Collectives side by side, against a slow and simple way to do the same; and records that make no sense."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from evermesh.fault.detectors import diagnose
from evermesh.fault.detectors.joining import join, slots_of, survey
from evermesh.fault.detectors.kernels import FIRST, INPUT_NS, INSIDE_NS, LAST, TRAIN_NS
from evermesh.fault.detectors.matching import match
from evermesh.fault.recorder.record import OPERATIONS, PHASES
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import Hang, Mismatch, Skip

_SEND = OPERATIONS.index("send")


def _slow_match(traces: "tuple[RankTrace, ...]") -> dict[tuple[str, int, int], tuple[int, int]]:
    """By group, number and rank: when it entered and left."""
    return {
        (trace.groups[int(record["group"])].name, int(record["number"]), trace.rank): (
            int(record["entered_ns"]),
            int(record["ended_ns"]),
        )
        for trace in traces
        for record in trace.records
        if record["operation"] < _SEND
    }


@pytest.mark.parametrize("seed", range(6))
def test_cells_are_what_a_dictionary_says(seed: int) -> None:
    shape = JobShape(dp=2, tp=2, pp=2, ring_capacity=90 + 10 * seed)
    traces = generate(shape, [Hang(seed, 9), Mismatch(1, 8, num_bytes=8)], seed).traces[seed % 2 :]
    joined = join(traces)
    matched = match(joined, slots_of(joined))
    found = {}
    for group, of in enumerate(joined.groups):
        entered, ended = matched.cells(group, matched.entered_at), matched.cells(group, matched.ended_at)
        for row, place in np.argwhere(entered > 0).tolist():
            key = (of.name, int(matched.first_numbers[group]) + row, of.ranks[place])
            found[key] = (int(entered[row, place]), int(ended[row, place]))
    assert found == _slow_match(traces)


@pytest.mark.parametrize("seed", range(3))
def test_a_survey_is_what_a_loop_over_records_says(seed: int) -> None:
    joined = join(generate(JobShape(dp=2, tp=2, pp=2), [Hang(3, 8)], seed).traces)
    surveyed = survey(joined)
    for index, trace in enumerate(joined.traces):
        records, times = trace.records, dict.fromkeys((TRAIN_NS, INPUT_NS, INSIDE_NS), 0)
        step = surveyed.first_step + 3
        for before, record in itertools.pairwise(records):
            if record["step"] == step:
                column = INPUT_NS if record["phase"] == PHASES.index("data") else TRAIN_NS
                times[column] += int(record["entered_ns"]) - int(before["ended_ns"])
                times[INSIDE_NS] += int(record["ended_ns"]) - int(record["entered_ns"])
        assert {column: int(surveyed.of_step[index, 3, column]) for column in times} == times
        for local, slot in enumerate(joined.slots(index).tolist()):
            numbers = records["number"][(records["group"] == local) & (records["operation"] < _SEND)]
            known = (int(numbers[0]), int(numbers[-1])) if len(numbers) else (-1, -1)
            assert slot < 0 or (surveyed.of_slot[slot, FIRST], surveyed.of_slot[slot, LAST]) == known


def test_the_order_of_the_traces_does_not_matter() -> None:
    traces = generate(JobShape(dp=4, pp=2), [Skip(3, 6)]).traces
    assert diagnose(traces) == diagnose(traces[::-1]) == diagnose([*traces, traces[2]])


def test_nothing_is_found_of_nothing() -> None:
    assert not diagnose([]).findings
    [trace, other] = generate(JobShape(dp=2)).traces
    empty = replace(trace, records=trace.records[:0], groups={})
    assert not diagnose([empty]).findings
    assert not diagnose([empty, other]).findings


def test_records_that_make_no_sense_do_no_harm() -> None:
    traces = generate(JobShape(dp=2, tp=2, pp=2), read_at=0.5).traces
    random = np.random.default_rng(0)
    for _ in range(60):
        changed = []
        for trace in traces:
            records = trace.records.copy()
            raw = records.view(np.uint8)
            places = random.integers(0, len(raw), 6)
            raw[places] = random.integers(0, 256, 6)
            records["operation"] %= len(OPERATIONS)  # names are checked where records are read
            records["dtype"] %= 16
            records["phase"] %= len(PHASES)
            changed.append(replace(trace, records=records))
        diagnose(changed)

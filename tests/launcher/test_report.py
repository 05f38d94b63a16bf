"""Reports of runs: every second counts once, stories are told in order, and a page needs nothing but itself."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from evermesh.fault.events import Event
from evermesh.launcher.controller.journal import Entry
from evermesh.launcher.report.accounting import (
    AGAIN,
    CHECKPOINTS,
    COUNTED,
    FIRST_START,
    LATER_START,
    SKIPPED,
    parts_of,
    spans_of,
    steps_of,
)
from evermesh.launcher.report.gathering import Cost, JobReport, Material, Training
from evermesh.launcher.report.incidents import incidents_of
from evermesh.launcher.report.isolated import isolated_nodes
from evermesh.launcher.report.page import page
from evermesh.runtime.telemetry import StepReport
from tests.launcher.reports import step_report

SCRIPT = "<script>alert(1)</script>"


def entry(time_s: float, kind: str, generation: int = 1, reason: str = "", **fields: str) -> Entry:
    return Entry(seq=1, time_s=time_s, generation=generation, kind=kind, reason=reason, fields=dict(fields))


def move(time_s: float, origin: str, to: str, generation: int = 1, reason: str = "") -> Entry:
    return entry(time_s, "transition", generation, reason, **{"from": origin, "to": to})


def step(number: int, ended_s: float, step_s: float, *, committed: bool = True, stop_s: float = 0.0) -> StepReport:
    return step_report(number, step_s, ended_s=ended_s, committed=committed, checkpoint_stop_s=stop_s, model_flops=1e9)


LOST = [
    entry(0, "launch", 0),
    move(2, "placing", "starting", 0),
    move(5, "starting", "training"),
    move(10, "training", "recovering", reason="rank 1 was killed"),
    move(11, "recovering", "starting"),
    move(14, "starting", "training", 2),
    move(20, "training", "finished", 2),
    entry(100, "launch", 2),
    move(103, "placing", "starting", 2),
]
"""A job that loses a rank, ends, and is resumed 80 s later."""


def test_where_the_time_of_a_job_went_by_hand() -> None:
    spans = spans_of(LOST, now_s=104)
    assert sum(span.seconds for span in spans) == 24
    reports = [
        step(1, 5, 1),
        step(2, 7, 2),
        step(3, 9, 2),
        step(3, 14, 2),
        step(4, 18, 4, stop_s=1),
        step(5, 20, 2, committed=False),
    ]
    parts = parts_of(spans, steps_of(reports))
    assert parts == pytest.approx(
        {
            COUNTED: 1 + 2 + 2 + 3,
            AGAIN: 2,
            SKIPPED: 2,
            CHECKPOINTS: 1,
            FIRST_START: (3 - 1) + 1,
            LATER_START: 3 - 2,
            "waiting for nodes to join": 2 + 3,
            "between steps": 1,
            "recovering: until the ranks of an attempt are gone": 1,
        }
    )
    assert list(parts.values()) == sorted(parts.values(), reverse=True)


STATES = ("placing", "starting", "training", "recovering", "waiting", "regrouping", "stopping")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_second_counts_once(drawn: st.DataObject) -> None:
    """Against a count of every hundredth of a second."""
    lengths = drawn.draw(st.lists(st.tuples(st.sampled_from(STATES), st.integers(1, 60)), min_size=1, max_size=8))
    entries, now = [entry(0, "launch")], 0
    for state, length in lengths:
        entries.append(move(now / 100, "", state))
        now += length
    gaps = drawn.draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.integers(-2, 1)), max_size=12))
    reports, at, number = [], 0, 0
    for gap, length, advance in gaps:
        at += gap + length
        number = max(1, number + (advance or 1))
        reports.append(step(number, at / 100, length / 100))
    spans, steps = spans_of(entries, now / 100), steps_of(reports)
    parts = parts_of(spans, steps)
    assert sum(parts.values()) == pytest.approx(now / 100)
    in_steps = [0.0] * now
    for one in steps:
        for place in range(round(one.begin_s * 100), min(now, round(one.report.ended_s * 100))):
            in_steps[place] = 0.01
    open_places = [
        place
        for span in spans
        if span.state in ("starting", "training", "regrouping", "stopping")
        for place in range(round(span.begin_s * 100), round(span.end_s * 100))
    ]
    expected = sum(in_steps[place] for place in open_places)
    assert parts.get(COUNTED, 0.0) + parts.get(AGAIN, 0.0) == pytest.approx(expected, abs=1e-6)


def test_of_steps_with_one_number_the_last_counts() -> None:
    found = steps_of([step(number, 1, 1) for number in (1, 2, 3, 2, 3, 4, 4, 5)])
    assert [one.report.step for one in found if not one.is_lost] == [1, 2, 3, 4, 5]
    assert [one.is_lost for one in found] == [False, True, True, False, False, True, False, False]


def test_the_story_of_an_incident_begins_with_its_cause_and_ends_with_the_next_step() -> None:
    def event(time_s: float, kind: str, **fields: int | str) -> Event:
        return Event(time_s=time_s, kind=kind, text=f"{kind} at {time_s}", fields=dict(fields))

    events = [
        event(3, "checkpoint"),
        event(9.5, "finding"),
        event(9.6, "checkpoint"),
        event(10.1, "failed"),
        event(11, "restarted", lost_steps=2, source="memory"),
        event(13, "resumed"),
        event(15, "checkpoint"),
    ]
    (incident,) = incidents_of(LOST[:6], events)
    assert incident.cause == "rank 1 was killed"
    assert [moment.kind for moment in incident.story] == ["finding", "failed", "restarted", "resumed"]
    assert incident.story[0].after_s == pytest.approx(-0.5)
    assert incident.phases == (("recovering", 1), ("starting", 3))
    assert (incident.steps_lost, incident.source, incident.until_training_s) == (2, "memory", 4)
    (unfinished,) = incidents_of(LOST[:4], events)
    assert unfinished.outcome == "not over yet"
    failed = [*LOST[:5], move(13, "starting", "failed", reason="three attempts without progress")]
    assert [one.outcome for one in incidents_of(failed, [])] == [
        "failed: three attempts without progress",
        "failed: three attempts without progress",
    ]


LEFT = [
    *LOST[:3],
    Entry(seq=1, time_s=3, generation=1, kind="attempt", reason="", fields={"nodes": ["node-0", "node-1"]}),
    move(30, "training", "regrouping", reason="going on without node-1"),
    Entry(seq=1, time_s=31, generation=2, kind="attempt", reason="", fields={"nodes": ["node-0", "node-2"]}),
    move(31, "regrouping", "starting", 2),
    move(32, "starting", "training", 2),
]


def test_a_node_that_got_less_to_do_and_was_left_has_a_story_though_no_attempt_failed() -> None:
    def event(time_s: float, kind: str, node: str | None = "node-1", **fields: JsonValue) -> Event:
        told: dict[str, JsonValue] = {"finding": {"node": node}} if kind == "finding" else {"node": node}
        return Event(time_s=time_s, kind=kind, text=kind, fields=(told if node else {}) | fields)

    decided: dict[str, Any] = {"carried_out": True, "by": None}
    events = [
        event(18, "finding"),
        event(19, "finding", "node-0"),
        event(20, "isolation", action="degrade", **decided),
        event(20.1, "speeds", None),
        event(21, "resumed", None, source="storage"),
        event(25, "isolation", "node-0", action="drain", carried_out=False, by=None),
        event(30, "isolation", action="drain", **decided),
        event(31.5, "resumed", None, source="memory"),
        event(40, "isolation", "node-0", action="degrade", **decided),
        event(50, "isolation", "node-0", action="watch", **decided),
    ]
    reports = [step(number, 8.0 + number, 1.0) for number in range(1, 9)]
    reports += [step(8 + number, 18.0 + 2 * number, 2.0) for number in range(1, 7)]
    reports += [step(14 + number, 32.0 + number, 1.0) for number in range(1, 40)]
    steps = steps_of(reports)
    assert incidents_of(LEFT, events, steps) == ()
    left, restored = isolated_nodes(LEFT, events, steps)
    assert (left.kind, left.node, left.steps_lost, left.source) == ("isolation", "node-1", 0, "memory")
    assert (left.cause, left.until_training_s) == ("node-1: finding", 2)
    assert left.outcome == "given less to do, then drained; trains again without it"
    assert left.phases == (("regrouping", 1), ("starting", 1))
    assert [(moment.kind, round(moment.after_s, 1)) for moment in left.story] == [
        ("finding", -2.0),
        ("isolation", 0.0),
        ("speeds", 0.1),
        ("isolation", 10.0),
        ("placed", 11.0),
        ("resumed", 11.5),
    ]
    rate = reports[0].tokens_per_s
    rates = {"before": rate, "found": rate / 2, "with less work for it": rate / 2, "after": rate}
    assert dict(left.throughput) == pytest.approx(rates)
    assert left.story[-2].text == "ranks on node-0, node-2; node-2 has the place of node-1"
    assert (restored.node, restored.outcome) == ("node-0", "its ranks have their whole share again")
    material = Material(spans=(), steps=tuple(steps), events=())
    assert "given less to do, then drained" in page(_report(incidents=(left, restored)), material)


def _report(**changes: object) -> JobReport:
    spans = spans_of(LOST, 104)
    found = JobReport(
        name=SCRIPT,
        directory="/runs/x",
        state="training",
        reason=SCRIPT,
        began_s=0.0,
        wall_s=sum(span.seconds for span in spans),
        attempts=2,
        workers=2,
        nodes=1,
        goodput=0.5,
        parts={COUNTED: 10.0, SCRIPT: 14.0},
        training=Training(
            steps=5,
            steps_wanted=None,
            skipped=0,
            trained_again=1,
            tokens=500,
            first_loss=3.0,
            loss=2.5,
            tokens_per_s=50.0,
            flops_per_s_and_worker=1e12,
            utilisation=0.4,
            largest_grad_norm=0.5,
        ),
        cost=Cost(worker_hours=1.0, useful_worker_hours=0.5, lost_worker_hours=0.1, price=2.5),
        incidents=incidents_of(LOST, [Event(time_s=10.5, kind="failed", text=SCRIPT)]),
        events={SCRIPT: 3},
        notable=(Event(time_s=1.0, kind="finding", text=SCRIPT),),
    )
    return found.model_copy(update=changes)


def test_a_page_needs_nothing_but_itself_and_what_others_wrote_stays_text(tmp_path: Path) -> None:
    reports = [step(1, 5, 1), step(2, 7, 2), step(3, 9, 2), step(3, 14, 2), step(4, 18, 4)]
    material = Material(spans=tuple(spans_of(LOST, 104)), steps=tuple(steps_of(reports)), events=())
    text = page(_report(), material)
    assert SCRIPT not in text
    assert text.count("&lt;script&gt;") >= 6
    assert "<script" not in text
    named = {found for found in re.findall(r"https?://[^\s\"'<]+", text) if "www.w3.org" not in found}
    assert named == set()
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert "utilisation 40.0%" in text
    (tmp_path / "report.html").write_text(text)
    empty = page(_report(incidents=(), notable=(), parts={}, events={}), Material(spans=(), steps=(), events=()))
    assert "None: no attempt ended before the job did." in empty

"""Findings, decisions and events survive JSON; the log survives its writers."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from evermesh.fault import (
    Abort,
    Continue,
    Decision,
    Event,
    EventLog,
    EventLogUnusable,
    Finding,
    Isolate,
    Restart,
    Skip,
    read_events,
)
from evermesh.fault.events import DecisionAdapter

FINDING = Finding(kind="slow link", node="n3", rank=5, link=(4, 5), evidence={"mean_s": 0.5}, confidence=0.9)


@pytest.mark.parametrize(
    "decision",
    [
        Continue(reason="nothing was found"),
        Skip(reason="the gradient is not finite", step=7),
        Restart(reason="rank 3 ended with signal 9"),
        Isolate(reason="2 findings", nodes=("n3",), evidence=(FINDING,)),
        Abort(reason="5 restarts in 600 s"),
    ],
)
def test_every_decision_survives_json_as_its_own_type(decision: Decision) -> None:
    assert DecisionAdapter.validate_json(decision.model_dump_json()) == decision


def test_findings_and_events_survive_json() -> None:
    event = Event(time_s=1.5, kind="step", step=3, phase="train", text="done", fields={"loss": 2.5, "ranks": [1]})
    assert Event.model_validate_json(event.model_dump_json()) == event
    assert Finding.model_validate_json(FINDING.model_dump_json()) == FINDING


def test_a_loss_that_is_not_finite_is_not_lost() -> None:
    event = Event(time_s=0, kind="step", text="spike", fields={"loss": float("inf")})
    assert Event.model_validate_json(event.model_dump_json()) == event


def test_decisions_need_a_reason_and_refuse_unknown_fields() -> None:
    for values in ({"kind": "abort"}, {"kind": "abort", "reason": "r", "node": "n"}, {"kind": "wait", "reason": "r"}):
        with pytest.raises(ValidationError):
            DecisionAdapter.validate_python(values)
    with pytest.raises(ValidationError):
        Finding(kind="hang", confidence=1.5)
    with pytest.raises(ValidationError):
        FINDING.rank = 3  # type: ignore[misc]


def test_events_are_read_back_in_order_with_their_time(tmp_path: Path) -> None:
    before = time.time()
    with EventLog(tmp_path / "run" / "events.jsonl") as log:
        written = [
            log.write("attempt", "worker group started", ranks=4),
            log.write("step", "step 3 done", step=3, phase="train", loss=2.25),
            log.write("text", 'line\nbreak, "quotes", ünïcode'),
        ]
    assert list(read_events(log.path)) == written
    assert before <= written[0].time_s <= time.time()
    assert [json.loads(line)["kind"] for line in log.path.read_text().splitlines()] == ["attempt", "step", "text"]


def test_an_unfinished_last_line_is_left_out_and_the_next_writer_starts_its_own(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        first = log.write("a", "whole")
    with path.open("ab") as file:
        file.write(b'{"time_s": 3.0, "kind": "b", "te')
    assert list(read_events(path)) == [first]
    with EventLog(path) as log:
        last = log.write("c", "after the crash")
    events = list(read_events(path))
    assert [event.kind for event in events] == ["a", "unreadable", "c"]
    assert events[1].text == '{"time_s": 3.0, "kind": "b", "te'
    assert events[-1] == last


def _write_many(path: str, writer: int) -> None:
    with EventLog(path) as log:
        for number in range(200):
            log.write("count", "x" * 3000, step=number, writer=writer)


def test_processes_that_share_a_log_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_write_many, args=(str(path), writer)) for writer in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    events = list(read_events(path))
    for writer in range(3):
        assert [event.step for event in events if event.fields.get("writer") == writer] == list(range(200))
    assert len(events) == 600


def test_a_log_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(EventLogUnusable, match="cannot be written"):
        EventLog(tmp_path)


def test_a_full_disk_is_not_swallowed() -> None:
    with EventLog("/dev/full") as log, pytest.raises(EventLogUnusable, match="No space left"):
        log.write("a", "lost")

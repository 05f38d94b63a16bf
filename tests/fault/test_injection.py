"""Schedules of faults: what is refused before a run starts, what is left to chance, and what a rank does to itself."""

import itertools
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from evermesh.fault.errors import InjectedFault, ScheduleInvalid
from evermesh.fault.events import read_events
from evermesh.fault.injection import KINDS, AtStep, Injection, RunShape, Schedule, Shot, draw, resolve
from evermesh.fault.injection.flipping import choose_bit
from evermesh.fault.injection.hook import Injector
from evermesh.fault.snapshot.keeper.slots import HEADER_BYTES, Header, Record, SlotFiles, held_by

SHAPE = RunShape(workers=4, nodes=2, steps=100, checkpoint_every=10)

EVERYTHING = """
seed: 7
expect_exit: 1
faults:
- {kind: kill, signal: 9, target: rank 3, at: {step: 5, phase: backward}, times: 3}
- {kind: kill, signal: TERM, target: launcher, at: {seconds: 2.5}}
- {kind: kill, target: job, at: {step: 50}}
- {kind: kill, target: rank all, at: {step: 20, phase: write}, times: 2, every: 30}
- {kind: stop, target: agent any, at: {seconds: 3}, continue_after_s: 2}
- {kind: slow, target: rank 0, at: {step: 7}, factor: 3, steps: 5}
- {kind: cut, target: node 1, at: {step: 7}, for_s: 5}
- {kind: delay, target: node 1, at: {step: 7}, seconds: 0.2, lost: 0.1, for_s: 5}
- {kind: fill, place: shm, free_bytes: 4096, at: {step: 7}, for_s: 5}
- {kind: flip, target: rank any, what: gradient, at: {step: 7}}
- {kind: poison, at: {step: 7}}
- {kind: raise, target: rank 2, at: {step: 10, phase: restore}, text: boom}
- {kind: hang, target: rank 2, at: {step: 7}, holds_gil: true}
"""


def schedule_of(*faults: dict[str, Any], seed: int = 0) -> Schedule:
    return Schedule.model_validate({"seed": seed, "faults": faults})


def shots_of(*faults: dict[str, Any], seed: int = 0, shape: RunShape = SHAPE) -> tuple[Shot, ...]:
    return resolve(schedule_of(*faults, seed=seed), shape).shots


def test_schedules_and_their_shots_are_the_same_after_a_round_trip_through_json() -> None:
    schedule = Schedule.model_validate(yaml.safe_load(EVERYTHING))
    assert Schedule.model_validate_json(schedule.model_dump_json()) == schedule
    injection = resolve(schedule, SHAPE)
    assert Injection.model_validate_json(injection.model_dump_json()) == injection
    written = json.loads(schedule.model_dump_json())
    assert [fault.get("target") for fault in written["faults"]][:5] == [
        "rank 3",
        "launcher",
        "job",
        "rank all",
        "agent any",
    ]


def test_a_schedule_becomes_one_shot_per_victim_and_time_with_nothing_left_to_chance() -> None:
    shots = resolve(Schedule.model_validate(yaml.safe_load(EVERYTHING)), SHAPE).shots
    assert [shot.number for shot in shots] == list(range(len(shots)))
    told = [str(shot) for shot in shots]
    assert told[:3] == ["kill rank 3 at step 5, backward"] * 3
    assert told[5:13] == [f"kill rank {rank} at step {step}, write" for step in (20, 50) for rank in range(4)]
    assert {shot.victim.which for shot in shots if shot.victim} <= {None, 0, 1, 2, 3}
    assert {str(shot) for shot in shots if not shot.is_inside} == {
        "kill SIGTERM launcher at second 2.5",
        "kill job at step 50, forward",
        *(text for text in told if text.startswith(("stop", "cut", "delay", "fill"))),
    }


def test_what_is_left_to_the_seed_is_the_same_for_the_same_seed_and_reaches_everybody() -> None:
    fault = {"kind": "kill", "target": "rank any", "at": {"step": 1}, "times": 40}
    assert shots_of(fault, seed=3) == shots_of(fault, seed=3)
    assert shots_of(fault, seed=3) != shots_of(fault, seed=4)
    assert {shot.victim.which for shot in shots_of(fault, seed=3) if shot.victim} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"target": "rank 4"}, "target: rank 4 is none of the 4 ranks of this job (0 to 3)"),
        ({"target": "agent 2"}, "target: agent 2 is none of the 2 agents of this job (0 to 1)"),
        ({"at": {"step": 101}}, "at.step: step 101, but the run ends with step 100"),
        (
            {"times": 3, "every": 40, "at": {"step": 40}},
            "at.step: the last time is step 120, but the run ends with step 100",
        ),
        (
            {"at": {"step": 15, "phase": "copy"}},
            "at.step: no checkpoint is due at step 15: one is due every 10 steps and behind the last step, 100",
        ),
        (
            {"target": "agent 0", "at": {"step": 5, "phase": "backward"}},
            "at.phase: only a rank can be hit at a place of a step; leave phase out",
        ),
        (
            {"at": {"seconds": 1}, "times": 2},
            "every: 2 times at the same second; set the seconds from one to the next",
        ),
        (
            {"target": "launcher"},
            "signal: SIGKILL would end who writes the report; the launcher takes SIGINT, SIGTERM, SIGHUP, SIGUSR1",
        ),
        ({"kind": "raise", "target": "controller"}, "target: raise does not hit controller; it hits rank"),
        ({"kind": "raise", "at": {"seconds": 2}}, "at.seconds: raise happens inside a rank: give at.step"),
        (
            {"kind": "poison", "at": {"step": 2, "phase": "backward"}},
            "at.phase: poison has its own place in a step; leave phase out",
        ),
    ],
)
def test_a_fault_that_does_not_fit_the_run_is_named_with_the_numbers(fault: dict[str, Any], problem: str) -> None:
    given = {"kind": "kill", "at": {"step": 1}, **fault}
    with pytest.raises(ScheduleInvalid) as caught:
        resolve(schedule_of({"kind": "raise", "at": {"step": 1}}, given), SHAPE)
    assert str(caught.value) == f"faults.1.{problem}."


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "kill", "at": {}},
        {"kind": "kill", "at": {"step": 1, "seconds": 2}},
        {"kind": "kill", "at": {"step": 1}, "signal": "SIGNOTHING"},
        {"kind": "kill", "at": {"step": 1}, "target": "rank one"},
        {"kind": "slow", "at": {"step": 1}},
        {"kind": "explode", "at": {"step": 1}},
    ],
)
def test_what_is_no_fault_is_refused(fault: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        schedule_of(fault)


def test_drawn_schedules_fit_their_run_with_a_whole_interval_between_any_two_faults() -> None:
    kinds = {"kill": 1.0, "stop": 1.0, "slow": 1.0, "raise": 1.0, "hang": 1.0, "flip": 1.0, "poison": 1.0}
    seen, begins = set(), set()
    for seed in range(100):
        schedule = draw(seed, 4, SHAPE, kinds)
        assert schedule == draw(seed, 4, SHAPE, kinds)
        shots = resolve(schedule, SHAPE).shots
        seen |= {shot.fault.kind for shot in shots}
        assert all(shot.is_inside or (isinstance(shot.at, AtStep) and shot.at.step <= 90) for shot in shots)
        moments = [(fault.kind, fault.at) for fault in schedule.faults]
        intervals = [(at.step - 1) // 10 for _, at in moments if isinstance(at, AtStep)]
        assert len(intervals) == 4
        assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(intervals))
        assert not any(at.step % 10 == 1 for kind, at in moments if kind == "raise" and isinstance(at, AtStep))
        begins |= set(intervals)
    assert seen == kinds.keys()
    assert begins == set(range(10))
    drawn: list[str] = [fault.kind for seed in range(300) for fault in draw(seed, 5, SHAPE).faults]
    for kind, rate in KINDS.items():
        assert drawn.count(kind) / len(drawn) == pytest.approx(rate / sum(KINDS.values()), abs=0.05)


def test_a_run_that_is_too_short_for_the_faults_is_refused_with_the_numbers() -> None:
    with pytest.raises(ScheduleInvalid, match=r"6 faults, .* need 110 steps; the run has 100\. Ask for at most 5"):
        draw(0, 6, SHAPE)
    with pytest.raises(ScheduleInvalid, match="explode cannot be drawn"):
        draw(0, 1, SHAPE, {"explode": 1})


def injector(events: Path, *faults: dict[str, Any], rank: int = 0) -> Injector:
    return Injector(shots_of(*faults), rank, events)


def fired(events: Path) -> list[str]:
    return [event.text for event in read_events(events)] if events.is_file() else []


def test_a_shot_is_fired_at_its_place_only_once_in_the_life_of_a_run_and_is_an_event_before(tmp_path: Path) -> None:
    events, fault = tmp_path / "events.jsonl", {"kind": "raise", "target": "rank 1", "at": {"step": 3}, "times": 2}
    for attempt in (1, 2, 3):
        own, other = injector(events, fault, rank=1), injector(events, fault, rank=0)
        for step in (1, 2):
            own.reach("forward", step)
        own.reach("all-reduce", 3)
        other.reach("forward", 3)
        if attempt <= 2:
            with pytest.raises(InjectedFault, match="injected"):
                own.reach("forward", 3)
        else:
            own.reach("forward", 3)
    assert fired(events) == ["raise rank 1 at step 3, forward"] * 2
    assert [event.kind for event in read_events(events)] == ["injected"] * 2


def test_what_cannot_be_written_down_is_not_injected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    own = injector(tmp_path / "events.jsonl", {"kind": "raise", "target": "rank 0", "at": {"step": 1}})
    own.reach("forward", 1)
    assert "not injected: raise rank 0 at step 1, forward" in capsys.readouterr().err


def test_an_exception_in_a_backward_pass_comes_out_of_it(tmp_path: Path) -> None:
    fault = {"kind": "raise", "target": "rank 0", "at": {"step": 2, "phase": "backward"}}
    own, weight = injector(tmp_path / "events.jsonl", fault), torch.ones(3, requires_grad=True)
    for step in (1, 2):
        own.reach("forward", step)
        loss = (own.through(weight * 2) ** 2).sum()
        if step == 2:
            with pytest.raises(InjectedFault):
                loss.backward()
        else:
            loss.backward()
    with torch.no_grad():
        own.through(weight * 2)  # an evaluation has no backward pass


@pytest.mark.parametrize("factor", [None, 100.0])
def test_a_poisoned_loss_poisons_the_gradient_of_all_micro_batches_of_one_step(
    tmp_path: Path, factor: float | None
) -> None:
    events = tmp_path / "events.jsonl"
    own = injector(events, {"kind": "poison", "target": "rank 0", "at": {"step": 2}, "factor": factor})
    gradients = []
    for step in (1, 2, 3):
        own.reach("forward", step)
        weight = torch.ones((), requires_grad=True)
        for _ in range(2):
            own.spoil(weight * 3).backward()
        with torch.no_grad():
            assert own.spoil(weight * 3) == 3  # an evaluation
        assert weight.grad is not None
        gradients.append(weight.grad.item())
    assert gradients[0] == gradients[2] == 6
    assert math.isnan(gradients[1]) if factor is None else gradients[1] == 600
    assert len(fired(events)) == 1


def test_a_flipped_bit_is_one_bit_of_the_element_that_was_named(tmp_path: Path) -> None:
    held = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    own = injector(
        tmp_path / "events.jsonl",
        {"kind": "flip", "target": "rank 0", "tensor": "b", "element": 4, "bit": 30, "at": {"step": 1}},
    )
    own.attach(lambda: {"a": [torch.zeros(3)], "b": [held]}, dict)
    own.reach("forward", 1)
    expected = [0.0, 1.0, 2.0, 3.0, _flipped(4.0, 30), 5.0]
    assert held.flatten().tolist() == expected
    text = "flip rank 0 at step 1, forward: bit 30 of element 4 of b, which was 4"
    assert fired(tmp_path / "events.jsonl") == [text]


@pytest.mark.parametrize(("what", "file"), [("snapshot", "data"), ("header", "header")])
def test_a_flipped_bit_of_a_snapshot_is_one_bit_of_the_newest_that_is_sealed(
    tmp_path: Path, what: str, file: str
) -> None:
    events, area = tmp_path / "events.jsonl", tmp_path / "area"
    before: dict[Path, bytes] = {}
    for number, step in ((0, 9), (1, 5)):
        files = SlotFiles.of(area, 2, number)
        files.folder.mkdir(parents=True)
        files.header.write_bytes(bytes(HEADER_BYTES))
        files.data.write_bytes(bytes(range(100)))
        header = Header(files.header)
        header.hold(Record(2, 1, step, 100, 1, "0" * 16, "a" * 64), "committed")
        header.close()
        before |= {path: path.read_bytes() for path in (files.header, files.data)}
    fault = {"kind": "flip", "what": what, "target": "rank 2", "at": {"step": 11}, "element": 70, "bit": 3}
    own = injector(events, fault, rank=2)
    own.memory = area
    own.reach("forward", 11)
    hit = getattr(SlotFiles.of(area, 2, 0), file)
    for path, content in before.items():
        expected = bytearray(content)
        expected[70] ^= 8 if path == hit else 0
        assert path.read_bytes() == bytes(expected)
    assert [held.record.step for held in held_by(area, 2)] == ([9, 5] if what == "snapshot" else [5])
    text = f"bit 3 of byte 70 of {hit.name} of the snapshot of step 9"
    assert fired(events) == [f"flip rank 2 at step 11, forward: {text}"]


def test_a_rank_without_snapshots_says_so(tmp_path: Path) -> None:
    fault = {"kind": "flip", "what": "snapshot", "target": "rank 0", "at": {"step": 1}}
    own = injector(tmp_path / "events.jsonl", fault)
    with pytest.raises(LookupError, match=r"rank 0 has no snapshot in memory yet\. Flip it in a later step"):
        own.reach("forward", 1)
    with pytest.raises(ValidationError, match="a snapshot has bytes; leave tensor out"):
        schedule_of(fault | {"tensor": "a"})


def _flipped(value: float, bit: int) -> float:
    """By way of the standard library: an oracle for little-endian float32."""
    (number,) = struct.unpack("<I", struct.pack("<f", value))
    (found,) = struct.unpack("<f", struct.pack("<I", number ^ 1 << bit))
    return float(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_bit_that_the_seed_chooses_changes_exactly_one_bit_of_what_is_held(dtype: torch.dtype) -> None:
    tensors = {"a": [torch.randn(5).to(dtype)], "b": [torch.randn(3).to(dtype), torch.randn(4).to(dtype)]}
    before = _bits(tensors)
    seen = set()
    for number in range(300):
        bit = choose_bit(_flip(), tensors, f"seed {number}")
        bit.flip()
        changed = [index for index, (one, other) in enumerate(zip(before, _bits(tensors), strict=True)) if one != other]
        assert len(changed) == 1
        seen |= set(changed)
        bit.flip()
        assert _bits(tensors) == before
    assert len(seen) > 100


def _flip() -> Any:
    return schedule_of({"kind": "flip", "at": {"step": 1}}).faults[0]


def _bits(tensors: dict[str, list[torch.Tensor]]) -> list[int]:
    flat = torch.cat([region.view(torch.uint8) for regions in tensors.values() for region in regions])
    return [(value >> place) & 1 for value in flat.tolist() for place in range(8)]


def test_a_tensor_that_the_rank_does_not_hold_is_an_error_that_names_what_it_holds() -> None:
    fault = schedule_of({"kind": "flip", "tensor": "c", "at": {"step": 1}}).faults[0]
    with pytest.raises(LookupError, match=r"this rank holds no parameter c; it holds a, b\."):
        choose_bit(fault, {"a": [torch.zeros(2)], "b": [torch.zeros(2)]}, "0")  # type: ignore[arg-type]


def test_the_trainer_of_a_run_without_faults_has_nothing_of_them_loaded() -> None:
    program = "import sys, evermesh.runtime.trainer; print([name for name in sys.modules if 'injection' in name])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"

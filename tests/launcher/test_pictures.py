"""Plots, plan pictures, progress lines and the summary."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from evermesh.fault.events import Event, EventLog
from evermesh.launcher import JobConfig, Run, load_job
from evermesh.launcher.plan_picture import certificate_line, headline, plan_png, plan_text, ring_colours, seconds
from evermesh.launcher.plots import Mark, loss_png, loss_text, marks
from evermesh.launcher.progress import Progress, duration, plain_line
from evermesh.launcher.summary import last_report, summary_table, traffic_seen
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.ledger import Traffic
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.simulator import simulate
from evermesh.runtime.telemetry import PlanSummary, StepReport

COST = CostModel(token_s=1e-5, pair_s=1e-8, micro_batch_s=1e-3)


def report(step: int, workers: int = 4, loss: float | None = None) -> StepReport:
    return StepReport(
        step=step,
        steps=30,
        loss=8.0 - step / 10 if loss is None else loss,
        grad_norm=1.0,
        lr=1e-3,
        committed=True,
        num_tokens=1000,
        num_sequences=5,
        num_split=0,
        workers=workers,
        step_s=0.5,
        time_left_s=65.0,
        plan=PlanSummary({1: 3, 2: 1, 4: 1}, (2, 3, 2, 2), 0.8, 1.1, 1.0),
        bytes_by_site={},
        batch="x",
        traffic=(
            Traffic("gradients", "all_reduce", "hdp", "network", 4_000_000, 3_000_000, 4),
            Traffic("plan", "broadcast", "control", "node", 8, 8, 4),
            Traffic("ring backward", "send", "hdp", "node", 4_000_000, 4_000_000, 8),
            Traffic("ring forward", "send", "hdp", "node", 5_000_000, 5_000_000, 8),
        )
        if workers > 1
        else (),
    )


REPORTS = [report(step, workers=4 if step <= 18 else 3) for step in range(1, 31)]
EVENTS = [
    Event(time_s=float(number), kind=kind, step=step, text="")
    for number, (kind, step) in enumerate(
        [("checkpoint", 10), ("checkpoint", 18), ("stopped", 18), ("resumed", 18), ("skipped", 19), ("checkpoint", 20)]
    )
]


def test_marks_gather_what_happened_at_a_step() -> None:
    assert [(mark.step, mark.text) for mark in marks(EVENTS, REPORTS)] == [
        (10, "saved"),
        (18, "saved · stopped · resumed on 3 workers"),
        (19, "skipped"),
        (20, "saved"),
    ]


def test_every_kind_of_mark_has_a_colour() -> None:
    kinds = ("checkpoint", "resumed", "layout moved", "skipped", "stopped", "failed")
    events = [Event(time_s=0.0, kind=kind, step=step, text="") for step, kind in enumerate(kinds)]
    found = marks(events, [])
    assert [mark.text for mark in found] == ["saved", "resumed", "moved", "skipped", "stopped", "failed"]
    assert all(mark.colour.startswith("#") for mark in found)


def test_the_loss_picture_is_written(tmp_path: Path) -> None:
    loss_png(REPORTS, marks(EVENTS, REPORTS), tmp_path / "loss.png", title="run", vocabulary=2048)
    assert (tmp_path / "loss.png").stat().st_size > 20_000


def test_labels_of_close_marks_do_not_overlap() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from evermesh.launcher import plots

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plots._draw_loss(axes, REPORTS)
    rows = plots._draw_marks(axes, [Mark(step, ("saved", "stopped")) for step in (9, 10, 11, 12, 28)])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert rows > 1
    assert not [(a, b) for number, a in enumerate(boxes) for b in boxes[:number] if a.overlaps(b)]


def test_many_checkpoints_are_marked_without_labels() -> None:
    from matplotlib.figure import Figure

    from evermesh.launcher import plots

    axes = Figure().add_subplot()
    found = [Mark(step, ("saved",)) for step in range(1, 30)] + [Mark(30, ("resumed",))]
    plots._draw_marks(axes, found)
    assert [text.get_text() for text in axes.texts] == ["resumed"]


def test_the_loss_is_drawn_in_the_terminal_within_its_width() -> None:
    lines = loss_text(REPORTS, marks(EVENTS, REPORTS), width=70).splitlines()
    assert max(map(len, lines)) <= 70
    assert "\x1b" not in "".join(lines)
    assert any("⠉" in line or "⣀" in line for line in lines)
    assert "resumed on 3 workers" in "".join(lines)


def test_a_plan_in_text_has_one_row_per_rank_with_all_its_tokens() -> None:
    plan = plan_batch([8000, 5000, 900, 700, 60], Layout(hdp=4, capacity=2560), COST)
    rows = plan_text(plan, simulate(plan, COST), width=90).plain.splitlines()
    totals = [int(row.split()[-1].replace(",", "")) for row in rows[:4]]
    assert sum(totals) == 14_660
    assert max(map(len, rows)) <= 90
    assert re.search(r"rank 0 .*\[4:2,000─+\]", rows[0])


@pytest.mark.parametrize("ranks", [1, 4, 70])
def test_the_plan_picture_is_written(tmp_path: Path, ranks: int) -> None:
    plan = plan_batch([2000, 900, 700, 60] * 5, Layout(hdp=ranks, capacity=2560), COST)
    plan_png(plan, simulate(plan, COST), tmp_path / "plan.png", title="plan")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_ring_sizes_have_different_colours_that_small_rings_keep_in_every_plan() -> None:
    plan = plan_batch([40_000, 25_000, 20_000, 15_000, 9_000, 5_000, 900], Layout(hdp=20, capacity=2560), COST)
    colours = ring_colours(plan)
    assert list(colours) == list(plan.ring_sizes())
    assert len(set(colours.values())) == len(colours) > 3
    assert max(colours) > 7
    small = plan_batch([5000, 100], Layout(hdp=2, capacity=2560), COST)
    shared = colours.keys() & ring_colours(small).keys()
    assert shared
    assert all(ring_colours(small)[size] == colours[size] for size in shared)


def test_the_certificate_and_the_headline_have_the_numbers() -> None:
    plan = plan_batch([100, 100], Layout(hdp=2, capacity=256), COST)
    assert re.fullmatch(r"makespan \S+ ms, bound \S+ ms \([a-z ]+\), ratio 1\.\d{3}, fill 39%", certificate_line(plan))
    assert headline(plan) == (
        "2 sequences, 200 tokens, longest 100; 2 ranks of 256 tokens. Sequences: 2 on 1 rank. Micro-batches per rank: 1 to 1."
    )


def test_times_have_the_unit_that_suits_them() -> None:
    assert [seconds(value) for value in (2.5, 0.0281, 4e-6, 3e-9)] == ["2.5 s", "28.1 ms", "4 us", "3 ns"]
    assert [duration(value) for value in (5, 65, 7389)] == ["0:05", "1:05", "2:03:09"]


def test_a_plain_line_tells_everything_about_a_step() -> None:
    assert plain_line(report(7)) == (
        "step  7/30 | loss 7.3000 | 2,000 tokens/s | rings 3x1 1x2 1x4 | fill 80% | makespan/bound 1.100 | 1:05 left"
    )


def test_a_step_that_was_evaluated_shows_both_losses(tmp_path: Path) -> None:
    evaluated = [replace(each, held_out_loss=each.loss + 0.5) if each.step % 10 == 0 else each for each in REPORTS]
    assert "| loss 7.0000 | held out 7.5000 |" in plain_line(evaluated[9])
    assert StepReport.from_json(evaluated[9].to_json()) == evaluated[9]
    for reports, name in ((REPORTS, "without.png"), (evaluated, "with.png")):
        loss_png(reports, [], tmp_path / name, title="run")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_without_a_terminal_fast_steps_are_thinned_out_but_first_and_last_are_shown() -> None:
    output = StringIO()
    with Progress(Console(file=output, width=200)) as progress:
        for number in range(1, 31):
            progress.show(report(number))
    assert [line.split()[1] for line in output.getvalue().splitlines()] == ["1/30", "30/30"]


def test_on_a_terminal_the_progress_is_one_line() -> None:
    output = StringIO()
    with Progress(Console(file=output, width=100, force_terminal=True)) as progress:
        progress.show(report(7))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue()).strip().splitlines()[-1]
    assert shown.startswith("step 7/30 ━")
    assert "loss 7.3000" in shown


@pytest.fixture
def run(job_file: Path) -> Run:
    """A run with telemetry and events."""
    job: JobConfig = load_job(job_file)
    found = Run.create(job)
    found.telemetry.write_text("".join(f"{item.to_json()}\n" for item in REPORTS))
    with EventLog(found.events) as events:
        for event in EVENTS:
            events.write(event.kind, event.text, step=event.step)
    return found


def test_the_summary_counts_what_telemetry_and_events_tell(run: Run) -> None:
    output = StringIO()
    Console(file=output, width=140).print(summary_table(run, vocabulary=2048))
    text = output.getvalue()
    for expected in (
        "30 of 30",
        "7.9000 at step 1, 5.0000 at step 30 (uniform guess: ln 2,048 = 7.6246)",
        "30,000 in 150 sequences",
        "4, then 3",
        "90 on 1 rank, 30 on 2 ranks, 30 on 4 ranks",
        "2 to 3 per rank and step; they differ between ranks in 30 steps",
        "12.0 MB per step: rings 9.0 MB, gradients 3.0 MB; 75% within nodes",
        "3 written, 1 resumed from",
    ):
        assert expected in text


def test_one_worker_sends_nothing() -> None:
    assert traffic_seen([report(1, workers=1)]) == "none between ranks"


def test_the_last_report_is_found_behind_an_unfinished_line(run: Run) -> None:
    with run.telemetry.open("a") as file:
        file.write('{"step": 31')
    newest = last_report(run.telemetry)
    assert newest is not None
    assert newest.step == 30

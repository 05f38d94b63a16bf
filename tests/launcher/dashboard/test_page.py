"""The page in a real browser, with what a real job has recorded."""

import dataclasses
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from evermesh.launcher import Run
from evermesh.launcher.planning import Degrees, read_case
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.dashboard.browser import Page
from tests.launcher.dashboard.recording import STEPS, Recorded, status_after
from tests.launcher.dashboard.serving import TOKEN, serve, show

SHOTS = Path("build/dashboard")
"""Pictures of the page, for people."""
MARKED = 44
"""A step at which nothing else happened."""
SCRIPT = '<img src=x onerror="document.body.dataset.hacked=1"> & <b>bold</b>'


def points(page: Page, chart: str, trace: str) -> int:
    """Points that a trace of a chart holds, by its name."""
    found = f"document.getElementById('{chart}').data.find(t => t.name === '{trace}')"
    return int(page.run(f"({found}?.x ?? []).filter(x => x !== null).length"))


def test_state_ranks_and_nodes_are_those_of_the_status(told: Recorded, page: Page) -> None:
    with serve(told) as port:
        show(page, port)
        assert page.text("h1") == "tiny"
        assert page.text(".state") == "training all ranks train"
        assert page.text("#step") == f"{STEPS} of {STEPS}"
        assert page.text("#loss") == f"{told.status.loss:.4f}"
        assert page.text("#left") == "1 min 23 s"
        assert "1 of at most 3" in page.text("#facts")
        assert page.count("#ranks tbody tr") == 4
        assert page.text("#ranks tbody tr:last-child th") == "3"
        assert page.count("#ranks .slow") == 1
        assert page.text("#ranks tbody tr:last-child .compute").endswith("2.2\N{MULTIPLICATION SIGN}")
        assert page.text("#nodes tbody tr:last-child").split()[:4] == ["node-1", "ready", "4.20", "s"]
        assert "2\N{EN DASH}3" in page.text("#nodes tbody tr:last-child")
        assert page.run("sessionStorage.length === 1 && location.hash === ''")
        assert page.errors == []
        assert {urlsplit(url).hostname for url in page.urls} == {"127.0.0.1"}
        assert not any(TOKEN in url for url in page.urls if "#" not in url)


def test_charts_hold_every_step_once_and_what_a_restart_undid_beside_it(told: Recorded, page: Page) -> None:
    times = Counter(step["step"] for step in told.steps)
    undone = sum(times.values()) - len(times)
    assert undone > 0
    with serve(told) as port:
        show(page, port)
        for chart, name in (("loss-chart", "loss"), ("speed-chart", "tokens/s")):
            assert points(page, chart, name) == len(times) == STEPS
            assert (
                points(page, chart, "undone by a restart") == undone + 1
            )  # and the step before, where it branches off
        drawn = page.run("document.querySelectorAll('#loss-chart .scatterlayer')[0].querySelectorAll('.point').length")
        assert drawn == STEPS + undone + 1
        latest = {step["step"]: step["loss"] for step in told.steps}
        assert page.run("[...document.getElementById('loss-chart').data.find(t => t.name === 'loss').y]") == [
            latest[step] for step in sorted(latest)
        ]


def test_events_are_marked_on_the_loss_and_listed_newest_first(told: Recorded, page: Page) -> None:
    kinds = Counter(event["kind"] for event in told.events)
    assert kinds["restarted"] == 1
    with serve(told) as port:
        show(page, port)
        assert points(page, "loss-chart", "checkpoint") == kinds["checkpoint"]
        assert points(page, "loss-chart", "restart") == 1
        assert points(page, "loss-chart", "stop") == kinds["finished"]
        assert points(page, "loss-chart", "resume") == kinds["resumed"]
        assert "restart" in page.text("#loss-chart .legend") or page.run(
            "[...document.querySelectorAll('#loss-chart .legendtext')].some(t => t.textContent === 'restart')"
        )
        assert page.count("#events li") == len(told.events)
        assert page.text("#events li:first-child .kind") == told.events[-1]["kind"]


@pytest.mark.parametrize("timed", [True, False])
def test_the_plan_has_one_block_per_micro_batch_and_one_colour_per_ring(
    told: Recorded, page: Page, timed: bool
) -> None:
    assert told.plan is not None
    told.timeline = told.timeline if timed else None
    micro_batches = [micro_batch for rank in told.plan.ranks for micro_batch in rank]
    rings = {piece.ring for batch in micro_batches for piece in batch.pieces if len(piece.ring) > 1}
    assert rings
    with serve(told) as port:
        show(page, port)
        page.wait("document.querySelector('#plan .block')")
        assert page.count("#plan .block") == len(micro_batches)
        shared = sum(any(len(piece.ring) > 1 for piece in batch.pieces) for batch in micro_batches)
        assert page.count("#plan .block[class*=ring-]") == shared
        assert ("predicted time" if timed else "Width: tokens") in page.text("#plan-note")
        page.hover("#plan .block[class*=ring-]")
        page.wait("!document.querySelector('#plan-tip').hidden")
        assert "ring of" in page.text("#plan-tip")
        assert "sequence" in page.text("#plan-tip")
        page.screenshot(SHOTS / f"plan-{'timed' if timed else 'tokens'}.png")


def test_text_of_an_event_is_never_read_as_html(told: Recorded, page: Page) -> None:
    told.say("failed", SCRIPT, step=MARKED)
    told.say("died", f"{SCRIPT}\n{SCRIPT}\nlast line")
    told.status = told.status.model_copy(update={"reason": SCRIPT, "name": SCRIPT})
    with serve(told) as port:
        show(page, port)
        assert page.text("h1") == SCRIPT
        assert page.text("#events li:nth-child(2) .text") == SCRIPT
        assert page.text("#events summary") == SCRIPT
        page.run(
            f"[...document.querySelectorAll('#loss-chart .point')].find(p => p.__data__.x === {MARKED}).id = 'marked'"
        )
        page.hover("#marked")
        page.wait("document.querySelector('#loss-chart .hoverlayer text')")
        assert f"failed: {SCRIPT}" in page.run("document.querySelector('#loss-chart .hoverlayer').textContent")
        page.screenshot(SHOTS / "script.png")
        assert page.count("img, b") == 0
        assert page.run("document.body.dataset.hacked ?? null") is None
        assert page.errors == []


def test_without_a_token_or_with_a_wrong_one_the_page_says_where_to_get_it(told: Recorded, page: Page) -> None:
    with serve(told) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("document.querySelector('#notice')?.hidden === false")
        assert "evermesh dashboard" in page.text("#notice")
        assert told.asked == []
        page.screenshot(SHOTS / "no-token.png")
        page.run("location.hash = 'token=wrong'")
        page.wait("performance.getEntriesByType('resource').some(e => e.name.endsWith('/api/watch'))")
        page.wait("!document.querySelector('#notice').hidden && sessionStorage.length === 0")
        assert "evermesh dashboard" in page.text("#notice")
        time.sleep(1.5)
        assert told.asked == ["/api/watch"]  # it does not hammer
        page.run(f"location.hash = 'token={TOKEN}'")
        page.wait("document.querySelector('#notice').hidden")
        assert page.text("#state") == "training"


def test_a_controller_that_is_gone_is_said_and_its_return_is_noticed(told: Recorded, page: Page) -> None:
    with serve(told) as port:
        show(page, port)
    page.wait("!document.querySelector('#notice').hidden")
    assert page.text("#notice").startswith("Controller not reachable, trying again")
    assert page.text("#state") == "training"
    page.screenshot(SHOTS / "gone.png")
    told.say("restarted", "the controller was started again", step=STEPS)
    told.status = told.status.model_copy(update={"state": "finished", "reason": "all steps are trained"})
    with serve(told, port):
        page.wait("document.querySelector('#notice').hidden")
        page.wait("document.querySelector('#state').textContent === 'finished'")
        assert page.count("#events li") == len(told.events)
        assert points(page, "loss-chart", "restart") == 2


def test_a_job_that_has_not_begun_says_so(told: Recorded, page: Page) -> None:
    told.steps, told.events, told.plan = [], [], None
    unknown = dict.fromkeys(("step", "steps", "loss", "tokens_per_s", "time_left_s"))
    placing = {"state": "placing", "reason": "waiting for 2 nodes", "nodes": (), "ranks": ()}
    told.status = told.status.model_copy(update=placing | unknown)
    with serve(told) as port:
        page.open(f"http://127.0.0.1:{port}/#token={TOKEN}")
        page.wait("document.querySelector('#events-note')?.hidden === false")
        assert page.text(".state") == "placing waiting for 2 nodes"
        assert [page.text(f"#{name}-note") for name in ("loss", "speed", "plan")] == [
            *2 * ["No step yet."],
            "No plan yet.",
        ]
        assert page.errors == []


def test_numbers_that_are_not_finite_are_left_out(told: Recorded, page: Page) -> None:
    told.status = told.status.model_copy(update={"loss": float("nan")})
    told.steps[-1]["loss"] = None
    with serve(told) as port:
        show(page, port)
        assert page.text("#loss") == "\N{EN DASH}"
        assert page.text("#state") == "training"
        assert page.errors == []


def test_a_job_of_1000_ranks_and_20000_steps_stays_quick(told: Recorded, page: Page, tmp_path: Path) -> None:
    report = read_telemetry(Run(Path(told.status.directory)).telemetry)[-1]
    last = dataclasses.replace(report, step=20_000, steps=50_000, workers=1000)
    told.status = status_after(last, tmp_path / "large", restarts=0)
    shape = told.steps
    told.steps = [{**shape[i % len(shape)], "step": i + 1, "seq": i + 1} for i in range(20_000)]
    told.steps[12_344]["loss"] = 99.0
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("\n".join(str(64 + 97 * i % 4000 + 60_000 * (i % 400 == 0)) for i in range(6000)))
    planned = read_case(lengths, Degrees(hdp=1000))
    told.plan, told.timeline = planned.plan, planned.timeline()
    with serve(told) as port:
        show(page, port)
        page.wait("document.querySelector('#plan .block')")
        assert page.count("#ranks tbody tr") == 64
        assert page.text("#ranks tbody tr:first-child th") == "999"
        assert "slowest 64 of 1,000" in page.text("#ranks-note")
        assert 1000 <= points(page, "loss-chart", "loss") <= 1500
        assert page.run("document.getElementById('loss-chart').data[0].y.includes(99)")
        assert page.count("#plan-ranks option") == 16
        page.screenshot(SHOTS / "large.png")
        page.run("Plotly.relayout('loss-chart', {'xaxis.range[0]': 12300, 'xaxis.range[1]': 12400}) && null")
        seen = "document.getElementById('loss-chart').data[0].x.filter(x => x >= 12300 && x <= 12400).length"
        page.wait(f"{seen} === 101")
        told.steps.append({**told.steps[-1], "step": 20_001, "seq": 20_001})
        assert page.run(LONGEST_TASK_MS) < 1000
        assert page.errors == []


LONGEST_TASK_MS = """new Promise(done => {
  let longest = 0;
  new PerformanceObserver(list => list.getEntries().forEach(e => { longest = Math.max(longest, e.duration) }))
    .observe({type: 'longtask'});
  setTimeout(() => done(longest), 2500);
})"""
"""The longest time in which the page did not answer, over two and a half polls."""


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("light", 1440, "light"), ("dark", 1440, "dark"), ("narrow", 480, "light")]
)
def test_the_page_fits_its_window(told: Recorded, page: Page, name: str, width: int, scheme: str) -> None:
    page.look(width=width, height=900, scheme=scheme)
    with serve(told) as port:
        show(page, port)
        page.wait("document.querySelector('#plan .block')")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        page.screenshot(SHOTS / f"{name}.png")


def test_files_are_served_with_a_strict_policy_and_asked_for_once(told: Recorded) -> None:
    with serve(told) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for path in ("/", "/static/app.js", "/static/style.css", "/static/plotly.js"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-security-policy"].startswith("default-src 'self';")
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert again.status_code == 304
        assert client.get("/static/page.py").status_code == 404
        assert client.get("/static/..%2fpage.py").status_code == 404

"""Jobs on the page in a real browser: one that runs, one of 8 ranks, and one of 12,288."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evermesh.launcher.client import Client
from tests.launcher.dashboard.browser import Page
from tests.launcher.dashboard.recording import Recorded
from tests.launcher.dashboard.serving import TOKEN, serve, show
from tests.launcher.dashboard.simulated import SLOW_RANK, moved, simulated
from tests.launcher.jobs import Job, launched

SHOTS = Path("build/dashboard")
"""Pictures of the page, for people."""
MOST_S, MOST_MS = 60.0, 5000.0
"""What no machine may take, however busy it is."""
STEP = "Number(document.querySelector('#step').textContent.split(' ')[0].replace(',', ''))"


@pytest.fixture
def told(tmp_path: Path) -> Recorded:
    return simulated(tmp_path / "pretrain", nodes=2, per_node=4, tp=1)


@pytest.fixture
def job(job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with launched(job_file, "train.steps=100000", "train.checkpoint.every=20") as job:
        yield job


def test_a_job_that_runs_is_seen_live_by_whoever_has_its_page_and_by_nobody_else(job: Job, page: Page) -> None:
    job.wait_training()
    entry = Client(job.run).write_entry_page()
    page.open(f"file://{entry}")
    page.wait(f"document.querySelector('#heat-box')?.hidden === false && {STEP} > 0")
    seen = page.run(STEP)
    page.wait(f"{STEP} > {seen} + 5")
    assert page.text("#state") == "training"
    assert page.count("#ranks tbody tr") == 2
    assert "2 ranks on 1 node." in page.text("#heat-note")
    page.wait("document.querySelector('#loss-chart .scatterlayer .js-line')")
    page.wait("document.querySelector('#plan .block')")
    page.wait("document.querySelectorAll('#checkpoints tbody tr').length")
    assert page.text("#delays-note").startswith("No delays between nodes")
    page.run("document.querySelector('#log-form').requestSubmit()")
    page.wait("document.querySelector('#log-note').textContent.startsWith('rank 0')")
    assert page.errors == []
    address = page.run("location.origin")
    page.run("sessionStorage.clear()")
    page.open(f"{address}/")
    page.wait("document.querySelector('#notice')?.hidden === false")
    assert page.run("document.querySelector('#job').hidden && document.querySelector('#name').textContent === ''")


def test_what_is_wrong_where_and_what_would_be_left_is_seen_at_a_glance(told: Recorded, page: Page) -> None:
    with serve(told) as port:
        show(page, port)
        assert page.count("#wrong-list li") == 2
        assert f"rank {SLOW_RANK} on node-1" in page.text("#wrong-list")
        assert f"most: rank {SLOW_RANK} on node-1" in page.text("#heat-note")
        assert page.run("[...document.querySelectorAll('#delays tbody tr')].map(r => r.cells[2].textContent)") == [
            "2.31\N{MULTIPLICATION SIGN}",
            "",
        ]
        back = page.run("document.querySelector('#delays tbody tr:nth-child(2)').cells[1].title")
        assert back == "64 messages", "what no finding names is what was measured"
        assert page.count("#states rect") == 6
        assert "4.30 s until the next step" in page.text("#incidents")
        assert page.count("#checkpoints tbody tr") == 8
        assert "step 1,998, 2 steps old" in page.text("#snapshot")
        assert page.errors == []


def test_the_heat_map_is_read_by_its_colours_by_pointer_and_by_keyboard(told: Recorded, page: Page) -> None:
    pixel = "[...document.querySelector('#heat').getContext('2d').getImageData({x}, {y}, 1, 1).data].slice(0, 3)"
    with serve(told) as port:
        show(page, port)
        red, green, blue = page.run(pixel.format(x=84 + 132 + 120, y=38 + 4))
        assert min(red, green) > 180 > blue, "the slow rank is as yellow as the scale gets"
        red, green, blue = page.run(pixel.format(x=84 + 132 + 120, y=4))
        assert max(red, green, blue) < 130
        page.run("document.querySelector('#heat').focus()")
        press = "document.querySelector('#heat').dispatchEvent(new KeyboardEvent('keydown', {{key: '{}'}}))"
        for key in ("Home", "ArrowRight", "ArrowDown"):
            page.run(press.format(key))
        assert page.text("#heat-rank").startswith(f"rank {SLOW_RANK} on node-1: training")
        page.run(press.format("Enter"))
        page.wait("document.querySelector('#log-text').textContent.endsWith('ms\\n')")
        assert page.text("#log-note").startswith(f"rank {SLOW_RANK}: bytes ")
        page.run("document.querySelector('#log-older').click()")
        page.wait("document.querySelector('#log-text').textContent.startsWith('[rank 5] step 0:')")
        page.run("document.querySelector('#heat-measure').value = 'behind'")
        page.run("document.querySelector('#heat-measure').dispatchEvent(new Event('change'))")
        assert "Steps behind: median 0" in page.text("#heat-note")
        page.run("document.querySelector('#log-rank').value = 7, document.querySelector('#log-form').requestSubmit()")
        page.wait("document.querySelector('#log-note').textContent.startsWith('rank 7 has no such file')")


def test_a_token_that_is_pasted_opens_the_page(told: Recorded, page: Page) -> None:
    with serve(told) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("document.querySelector('#token-form')?.hidden === false")
        page.run(f"document.querySelector('#token').value = ' {TOKEN}\\n'")
        page.run("document.querySelector('#token-form').requestSubmit()")
        page.wait("document.querySelector('#state').textContent === 'training'")
        assert page.run("document.querySelector('#token').value") == ""
        assert not any(TOKEN in url for url in page.urls)


def test_12288_ranks_are_seen_in_seconds_and_followed(page: Page, tmp_path: Path) -> None:
    told, draw = simulated(tmp_path / "pretrain", nodes=1536, per_node=8, tp=8), random.Random(1)
    with serve(told) as port:
        began_s = time.perf_counter()
        page.open(f"http://127.0.0.1:{port}/#token={TOKEN}")
        page.wait("document.querySelector('#heat-box')?.hidden === false")
        loaded_s = time.perf_counter() - began_s
        page.wait("document.querySelector('#loss-chart .scatterlayer .js-line')")
        drawn_ms = []
        for _ in range(3):
            moved(told, draw)
            page.wait(f"{STEP} === {told.status.step}")
            drawn_ms.append(float(page.run("document.querySelector('#drawn').dataset.ms")))
        print(
            f"12,288 ranks: seen after {loaded_s:.2f} s, updates drawn in {', '.join(f'{ms:.0f}' for ms in drawn_ms)} ms"
        )
        assert "12,288 ranks on 1,536 nodes." in page.text("#heat-note")
        assert "8 ranks do not train: 24\N{EN DASH}31." in page.text("#heat-note")
        assert page.count("#ranks tbody tr") == page.count("#nodes tbody tr") == 64
        assert "node-9" in page.text("#wrong-list")
        assert page.errors == []
        page.screenshot(SHOTS / "ranks-12288.png")
    assert loaded_s < MOST_S
    assert max(drawn_ms) < MOST_MS


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1440, "dark"), (480, "light")])
def test_all_panels_fit_the_window(told: Recorded, page: Page, width: int, scheme: str) -> None:
    page.look(width=width, height=900, scheme=scheme)
    with serve(told) as port:
        show(page, port)
        page.wait("document.querySelector('#plan .block')")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        page.screenshot(SHOTS / f"ranks-8-{scheme}-{width}.png")

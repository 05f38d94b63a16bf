"""What is streamed to the page: shaped from the status and the files of a run, and told in differences."""

import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from evermesh.fault.events import Finding
from evermesh.launcher import Run
from evermesh.launcher.controller.status import DelayStatus, JobState
from evermesh.launcher.dashboard.board import Board, board_of, changes
from evermesh.launcher.dashboard.delays import delays_of
from evermesh.launcher.dashboard.history import FileReader, recovery_of
from evermesh.launcher.dashboard.logs import PAGE_BYTES, read_page
from evermesh.launcher.dashboard.stream import Feed
from tests.launcher.dashboard.recording import Recorded
from tests.launcher.dashboard.serving import ToldSource
from tests.launcher.dashboard.simulated import SLOW_RANK, moved, simulated


@pytest.fixture
def told(tmp_path: Path) -> Recorded:
    return simulated(tmp_path / "pretrain", nodes=2, per_node=4, tp=1)


def applied(board: Board, changed: Board) -> Board:
    """What the page does with a message."""
    return {**board, **{name: {**board.get(name, {}), **fields} for name, fields in changed.items()}}


def test_what_was_told_in_differences_adds_up_to_what_is(told: Recorded) -> None:
    draw = random.Random(3)
    seen: Board = {}
    for step in range(20):
        if step == 7:
            told.status = told.status.model_copy(update={"ranks": told.status.ranks[:4], "state": "recovering"})
        board = board_of(told.status)
        seen = applied(seen, changes(seen, board))
        assert seen == board
        assert changes(seen, board) == {}
        moved(told, draw)


def test_a_step_sends_the_columns_that_change_and_no_others(told: Recorded) -> None:
    before = board_of(told.status)
    moved(told, random.Random(3))
    changed = changes(before, board_of(told.status))
    assert {name: sorted(fields) for name, fields in changed.items()} == {
        "job": ["step"],
        "ranks": ["compute_us", "step"],
    }


def test_the_board_is_json_whatever_numbers_a_job_has(told: Recorded) -> None:
    ranks = (told.status.ranks[0].model_copy(update={"step_s": float("inf"), "compute_s": float("nan")}),)
    odd = Finding(kind="slow job", confidence=0.5, evidence={"ratio": float("inf")})
    board = board_of(told.status.model_copy(update={"loss": float("nan"), "ranks": ranks, "findings": (odd,)}))
    assert json.loads(json.dumps(board, allow_nan=False))["job"]["loss"] is None
    assert board["ranks"]["step_us"] == board["ranks"]["compute_us"] == [None]


def test_columns_of_12288_ranks_hold_what_the_status_says(tmp_path: Path) -> None:
    status = simulated(tmp_path / "large", nodes=1536, per_node=8, tp=8).status
    began_s = time.perf_counter()
    board = board_of(status)
    took_s = time.perf_counter() - began_s
    size = len(json.dumps(board))
    print(f"12,288 ranks: the board is made in {1e3 * took_s:.1f} ms, {size / 1024:.0f} KiB as JSON")
    ranks, nodes = board["ranks"], board["nodes"]
    for rank in status.ranks:
        place = rank.rank
        assert nodes["node"][ranks["node"][place]] == rank.node
        assert ranks["states"][ranks["state"][place]] == rank.state
        assert ranks["compute_us"][place] == round(1e6 * (rank.compute_s or 0))
    assert size < 2_000_000


def test_cells_of_the_delay_matrix_are_what_findings_name(told: Recorded) -> None:
    def cells(*findings: Finding) -> list[list[Any]]:
        found = delays_of(told.status.model_copy(update={"findings": findings}))["cells"]
        return [cell[:3] for cell in found]

    one_way = {"ratio": 2.5, "from": 5, "to": 1}
    assert cells(Finding(kind="slow link", link=(1, 5), evidence=one_way, confidence=1)) == [["node-1", "node-0", 2.5]]
    both = [["node-0", "node-1", None], ["node-1", "node-0", None]]
    assert cells(Finding(kind="slow link", link=(1, 5), confidence=1)) == both
    assert cells(Finding(kind="slow source", rank=5, node="node-1", confidence=1)) == [["node-1", None, None]]
    assert cells(Finding(kind="slow destination", rank=5, confidence=1)) == [[None, "node-1", None]]
    assert len(cells(Finding(kind="slow node", node="node-1", confidence=1))) == 2
    assert cells(Finding(kind="slow rank", rank=SLOW_RANK, node="node-1", confidence=1)) == []
    assert cells(Finding(kind="slow link", link=(1, 99), confidence=1)) == [], "of an attempt that is over"


def test_the_delay_matrix_has_what_messages_measured(told: Recorded) -> None:
    measured = DelayStatus(source="node-1", target="node-0", ratio=1.25, messages=90)
    found = delays_of(told.status.model_copy(update={"findings": (), "delays": (measured,)}))
    assert found == {"cells": [], "measured": [["node-1", "node-0", 1.25, 90]]}


def test_attempts_and_incidents_of_a_real_run_are_told(run: Run) -> None:
    recovery = recovery_of(run)
    states = [state for state, *_ in recovery["spans"]]
    assert states[:2] == ["placing", "starting"]
    assert states.count("training") == 2
    (incident,) = recovery["incidents"]
    assert incident["source"] == "storage"
    assert incident["steps_lost"] > 0
    json.dumps(recovery, allow_nan=False)


def test_a_reader_tells_every_line_once_and_says_when_there_is_more(run: Run, tmp_path: Path) -> None:
    copy = Run(tmp_path)
    line = run.telemetry.read_bytes().splitlines(keepends=True)[0]
    copy.telemetry.write_bytes(line * 9000)
    reader, counts, more = FileReader(copy), [], True
    while more:
        news = reader.read_on()
        counts.append(len(news.steps))
        more = news.has_more
    assert sum(counts) == 9000
    assert max(counts) <= 4000
    with copy.telemetry.open("ab") as file:
        file.write(line + line[:20])
    assert len(reader.read_on().steps) == 1


@pytest.mark.parametrize("longest", [30, 3 * PAGE_BYTES])
def test_pages_of_a_log_go_back_to_its_beginning_without_a_gap(tmp_path: Path, longest: int) -> None:
    path, draw = tmp_path / "rank-0.log", random.Random(longest)
    content = b"".join(
        b"%d %s\n" % (number, b"x" * draw.randrange(longest)) for number in range(9000 if longest < 99 else 9)
    )
    path.write_bytes(content)
    page = read_page(path)
    parts = [page]
    while page.begin > 0:
        page = read_page(path, before=page.begin)
        assert page.end == parts[0].begin
        parts.insert(0, page)
    assert "".join(part.text for part in parts).encode() == content
    assert max(part.end - part.begin for part in parts) <= PAGE_BYTES
    forward, at = b"", 0
    while at < len(content):
        page = read_page(path, after=at)
        forward, at = forward + page.text.encode(), page.end
    assert forward == content
    assert read_page(path, after=1 << 60).text == read_page(path, before=0).text == ""


def test_a_log_that_is_a_link_or_a_pipe_or_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "rank-0.log").symlink_to(tmp_path / "token")
    os.mkfifo(tmp_path / "rank-1.log")
    (tmp_path / "rank-2.log").mkdir()
    for rank in range(4):
        with pytest.raises(OSError, match=r"rank-|Is a directory"):
            read_page(tmp_path / f"rank-{rank}.log")


class Ending(ToldSource):
    """A job that ends when that is wanted; counts how often it is looked at."""

    def __init__(self, told: Recorded) -> None:
        super().__init__(told)
        self.looks, self.now = 0, "training"

    @property
    def state(self) -> JobState:
        return "finished" if self.now == "finished" else "training"

    def status(self) -> Any:
        self.looks += 1
        return super().status()


def test_viewers_share_what_is_made_and_are_told_the_end(told: Recorded) -> None:
    source = Ending(told)

    async def view(feed: Feed) -> list[dict[str, Any]]:
        return [json.loads(line) async for line in feed.lines()]

    async def watch() -> list[list[dict[str, Any]]]:
        feed = Feed(source, period_s=0.4)
        viewers = [asyncio.create_task(view(feed)) for _ in range(5)]
        await asyncio.sleep(1.0)
        source.now = "finished"
        return await asyncio.wait_for(asyncio.gather(*viewers), 20)

    all_told = asyncio.run(watch())
    for lines in all_told:
        assert len(lines) >= 2
        assert sum(len(line["steps"]) for line in lines) == len(told.steps)
        assert lines[0]["changed"]["ranks"]["step"] == [2000] * 8
        assert all("ranks" not in line["changed"] for line in lines[1:])
    in_turn = max(len(lines) for lines in all_told)
    assert source.looks <= in_turn + 5, (
        "once per period and once per viewer at the end, not for every viewer every time"
    )

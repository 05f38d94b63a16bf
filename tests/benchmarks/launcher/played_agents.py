"""``python -m tests.benchmarks.launcher.played_agents RUN NODES SECONDS [SLOWER]``: agents of a job.

Each greets, starts its ranks when it is told to, and beats twice a second; the first one tells of a step every second. With
SLOWER, 1 or more, they also tell what their ranks recorded, as the agents of so many ranks do, and everything so many times
more rarely. After so many seconds of training they have the job stopped; then the last line is how long all of them took
from the first greeting until they were told to start, seconds.
"""

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from evermesh.launcher import Client, Run
from evermesh.launcher.contact import read_contact
from evermesh.launcher.messages import (
    Ask,
    Beat,
    End,
    Hello,
    Leave,
    OpenStore,
    Outcome,
    Progress,
    RankBeat,
    Report,
    Start,
    Started,
    Store,
    StoreOpened,
    ToAgentAdapter,
)
from tests.benchmarks.launcher.played_windows import PlayedWindows
from tests.launcher.reports import step_report

_BEAT_S = 0.5
_STEP_S = 1.0
_AT_ONCE = 50
"""Agents that connect at the same time."""


class Played:
    """One of them."""

    def __init__(self, run: Run, number: int, token: str, windows: PlayedWindows | None) -> None:
        self._run, self._number, self._token, self._windows = run, number, token, windows
        self._start: Start | None = None
        self._began_s = 0.0
        self.told_s = 0.0
        """When it was first told to start, monotonic."""
        self.trained_s = 0.0

    async def live(self, gate: asyncio.Semaphore) -> None:
        """Until it is told to leave."""
        node = f"node-{self._number}"
        url = read_contact(self._run.directory, node)
        assert url is not None
        headers = {"Authorization": f"Bearer {self._token}"}
        address = f"{url.replace('http', 'ws', 1)}/api/agents/{node}"
        async with gate:
            connection = await connect(
                address,
                additional_headers=headers,
                proxy=None,
                ping_interval=1,
                ping_timeout=30,
                open_timeout=60,
                compression=None,
                max_size=None,
            )
            await _say(
                connection, Hello(node=node, host=node, address="127.0.0.1", pid=1000 + self._number, outcome=None)
            )
        talking = [asyncio.create_task(talk(connection)) for talk in (self._beat, self._tell_windows)]
        try:
            async for text in connection:
                if not await self._obey(connection, text):
                    return
        finally:
            for task in talking:
                task.cancel()
            await connection.close()

    async def _obey(self, connection: ClientConnection, text: str | bytes) -> bool:
        """Do what is asked for; whether it stays."""
        match ToAgentAdapter.validate_json(text):
            case OpenStore(generation=generation):
                await _say(connection, StoreOpened(generation=generation, store=Store(host="127.0.0.1", port=1)))
            case Start() as start if self._start is None:
                self._start, self._began_s = start, time.monotonic()
                self.told_s = self.told_s or self._began_s
                pids = {rank: 5000 + rank for rank in _ranks(start)}
                await _say(connection, Started(generation=start.generation, pids=pids))
            case Ask(what="stop", generation=generation) if self._start is not None:
                done = {rank: {"reason": "asked"} for rank in _ranks(self._start)}
                await _say(connection, Progress(outcome=Outcome(generation=generation, done=done, is_over=True)))
                self._start = None
            case End(generation=generation):
                self._start = None
                await _say(connection, Progress(outcome=Outcome(generation=generation, is_over=True)))
            case Leave():
                return False
        return True

    async def _beat(self, connection: ClientConnection) -> None:
        told = 0
        while True:
            start = self._start
            self.trained_s = time.monotonic() - self._began_s if start is not None else 0.0
            step = int(self.trained_s / _STEP_S)
            ranks = () if start is None else tuple(_beat_of(rank, step) for rank in _ranks(start))
            generation = 0 if start is None else start.generation
            try:
                await _say(connection, Beat(generation=generation, ranks=ranks, memory_free_bytes=time.monotonic_ns()))
                if start is not None and start.place.first_rank == 0 and step > told:
                    told = step
                    values = step_report(step, _STEP_S).to_json()
                    await _say(connection, Report(generation=generation, values=json.loads(values)))
            except ConnectionClosed:
                return
            await asyncio.sleep(_BEAT_S * (self._windows.slower if self._windows is not None else 1.0))

    async def _tell_windows(self, connection: ClientConnection) -> None:
        """All agents at about the same moment, as real ones do."""
        windows = self._windows
        if windows is None:
            return
        said = 0
        while True:
            await asyncio.sleep(windows.every_s - time.time() % windows.every_s)
            if self._start is not None:
                with suppress(ConnectionClosed):
                    await connection.send(windows.text(self._start.generation, _ranks(self._start), said))
                said += 1


def _ranks(start: Start) -> range:
    return range(start.place.first_rank, start.place.first_rank + start.place.ranks)


def _beat_of(rank: int, step: int) -> RankBeat:
    return RankBeat(
        rank=rank,
        pid=5000 + rank,
        step=step,
        step_s=_STEP_S,
        compute_s=0.9,
        longest_s=_STEP_S,
        point="train",
        idle_s=0.0,
    )


async def _say(connection: ClientConnection, message: BaseModel) -> None:
    await connection.send(message.model_dump_json())


async def _play(run: Run, nodes: int, seconds: float, windows: PlayedWindows | None) -> None:
    token = (run.directory / "token").read_text().strip()
    gate = asyncio.Semaphore(_AT_ONCE)
    agents = [Played(run, number, token, windows) for number in range(nodes)]
    began_s = time.monotonic()
    lives = [asyncio.create_task(agent.live(gate)) for agent in agents]
    asked = False
    while not all(life.done() for life in lives):
        await asyncio.sleep(0.5)
        for life in lives:
            if life.done():
                life.result()  # one that has lost its controller ends all
        if not asked and agents[0].trained_s > seconds:
            asked = True
            await asyncio.to_thread(lambda: Client(run, 60.0).stop(signal.SIGTERM))
    print(max(agent.told_s for agent in agents) - began_s, flush=True)


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    played = Run(Path(sys.argv[1]))
    windows = PlayedWindows(played, float(sys.argv[4])) if len(sys.argv) > 4 else None
    asyncio.run(_play(played, int(sys.argv[2]), float(sys.argv[3]), windows))

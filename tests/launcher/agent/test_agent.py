"""An agent as a process, and a controller that only listens: the protocol, signals, and its end."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import BaseModel

from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.config import HangConfig
from evermesh.launcher.contact import write_contact
from evermesh.launcher.messages import (
    Ask,
    Beat,
    End,
    FromAgent,
    FromAgentAdapter,
    Hello,
    Leave,
    OpenStore,
    Outcome,
    Place,
    Preempted,
    Progress,
    Start,
    Started,
    Store,
    TrainingWork,
    Welcome,
)
from evermesh.launcher.processes import AGENT_MODULE
from evermesh.launcher.succession.peers import Peers
from evermesh.launcher.succession.protocol import Vote
from tests.launcher.agent.listening import TOKEN, Controller, controlled
from tests.processes import lives, still_alive

FUNCTIONS = "tests.launcher.agent.worker_functions"
WAIT_S = 30.0


class Served:
    """An agent, and what it said."""

    def __init__(self, process: subprocess.Popen[str], controller: Controller, run: Path) -> None:
        self.process, self.controller, self.run = process, controller, run

    @property
    def heard(self) -> list[FromAgent]:
        return [FromAgentAdapter.validate_json(message) for message in list(self.controller.heard)]

    def all(self, kind: type[BaseModel]) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    def until(self, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < until, [found for found in self.heard if found.kind != "beat"]
            time.sleep(0.01)

    def send(self, message: BaseModel | str) -> None:
        self.controller.connections[-1].send(message if isinstance(message, str) else message.model_dump_json())

    def start(self, generation: int, function: str = "wait_for_stop", hang: HangConfig | None = None) -> None:
        """Two ranks."""
        work = TrainingWork(entry=f"{FUNCTIONS}:{function}", arguments={}, logs=str(self.run / "logs"))
        place = Place(first_rank=0, ranks=2, world_size=2, node_rank=0, nodes=1)
        store = Store(host="127.0.0.1", port=1)
        self.send(Start(generation=generation, place=place, store=store, work=work, hang=hang))

    def started(self, generation: int) -> list[psutil.Process]:
        """The processes of a generation, as soon as they are told."""
        self.until(lambda: any(found.generation == generation for found in self.all(Started)))
        told = next(found for found in self.all(Started) if found.generation == generation)
        return [psutil.Process(pid) for pid in told.pids.values()]

    def outcomes(self, generation: int) -> list[Outcome]:
        return [found.outcome for found in self.all(Progress) if found.outcome.generation == generation]


@contextmanager
def serving(folder: Path, **spec: Any) -> Iterator[Served]:
    """An agent that has said hello; nothing of it is left at the end."""
    with controlled() as controller:
        write_contact(folder, controller.url)
        (folder / "token").write_text(TOKEN)
        values: dict[str, Any] = {
            "run": folder, "node": "node-0", "address": "127.0.0.1", "slots": 2, "warm_module": FUNCTIONS
        }  # fmt: skip
        command = [sys.executable, "-m", AGENT_MODULE, AgentSpec(**values | spec).model_dump_json()]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            agent = Served(process, controller, folder)
            try:
                agent.until(lambda: bool(agent.all(Hello)))
                yield agent
            finally:
                process.kill()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as agent:
        yield agent


def test_it_says_who_it_is_and_workers_know_no_token(agent: Served) -> None:
    hello = agent.all(Hello)[0]
    assert (hello.node, hello.pid, hello.outcome, hello.shared_memory_bytes) == ("node-0", agent.process.pid, None, 256)
    agent.until(lambda: bool(agent.all(Beat)))
    assert 0 < agent.all(Beat)[0].shared_memory_free_bytes <= shutil.disk_usage("/dev/shm").total
    agent.start(1)
    for rank in agent.started(1):
        assert TOKEN not in str((rank.environ(), rank.cmdline()))
    itself = psutil.Process(agent.process.pid)
    assert TOKEN not in str((itself.environ(), itself.cmdline()))


def test_a_start_said_twice_starts_once_and_an_older_one_starts_nothing(agent: Served) -> None:
    agent.start(2)
    ranks = agent.started(2)
    agent.start(2)
    agent.start(1)
    agent.send(Ask(generation=1, what="stop"))
    agent.send(End(generation=1))
    agent.send("{")  # of another version, perhaps
    agent.send(OpenStore(generation=3))
    agent.until(lambda: any(found.kind == "store_opened" for found in agent.heard))
    assert len(agent.all(Started)) == 1
    assert all(map(lives, ranks))
    agent.send(Ask(generation=2, what="stop"))
    agent.until(lambda: any(found.is_over for found in agent.outcomes(2)))
    assert agent.outcomes(2)[-1].done == {0: {"reason": "asked"}, 1: {"reason": "asked"}}


def test_a_newer_start_ends_the_older_ranks_first(agent: Served) -> None:
    agent.start(1)
    older = agent.started(1)
    agent.start(2)
    newer = agent.started(2)
    assert not any(map(lives, older))
    assert any(map(lives, newer))
    assert not any(found.failures or found.is_over for found in agent.outcomes(2))


@pytest.mark.parametrize("runs_an_older_one", [False, True])
def test_the_end_of_what_never_started_here_is_over_at_once(agent: Served, runs_an_older_one: bool) -> None:
    ranks = []
    if runs_an_older_one:
        agent.start(1)
        ranks = agent.started(1)
    agent.send(End(generation=5))
    agent.until(lambda: bool(agent.outcomes(5)))
    assert agent.outcomes(5) == [Outcome(generation=5, is_over=True)]
    agent.until(lambda: not any(map(lives, ranks)))


def test_all_is_told_again_to_who_connects_next(agent: Served) -> None:
    agent.start(3)
    ranks = agent.started(3)
    ranks[1].kill()
    agent.until(lambda: any(found.failures for found in agent.outcomes(3)))
    agent.controller.connections[-1].close()
    agent.until(lambda: len(agent.all(Hello)) == 2)
    told = agent.all(Hello)[1].outcome
    assert (told.generation, told.failures[0].rank, told.is_over) == (3, 1, False)
    assert agent.all(Started)[-1].pids == {0: ranks[0].pid}


def test_the_first_sigterm_announces_the_end_of_the_node_and_the_second_is_it(agent: Served) -> None:
    agent.start(1)
    ranks = agent.started(1)
    agent.process.send_signal(signal.SIGINT)
    agent.process.send_signal(signal.SIGHUP)
    agent.process.send_signal(signal.SIGTERM)
    agent.until(lambda: bool(agent.all(Preempted)))
    assert agent.all(Preempted)[0].signal == signal.SIGTERM
    assert any(map(lives, ranks))
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(WAIT_S) == 0
    assert not any(map(lives, ranks))


def test_it_leaves_when_told_and_takes_everything_with_it(agent: Served) -> None:
    agent.start(1)
    agent.started(1)
    family = psutil.Process(agent.process.pid).children(recursive=True)
    area = list(Path("/dev/shm").glob(f"evermesh-*-{agent.process.pid}-node-0"))
    assert len(area) == 1
    agent.send(Leave())
    assert agent.process.wait(WAIT_S) == 0
    psutil.wait_procs(family, timeout=5)
    assert not any(map(lives, family))
    assert not area[0].exists()


def test_without_a_controller_it_leaves_when_it_has_nothing_to_run_and_not_before(tmp_path: Path) -> None:
    with serving(tmp_path, orphan_limit_s=0.5) as agent:
        agent.start(1)
        ranks = agent.started(1)
        agent.controller.close()
        (tmp_path / "controller.json").unlink()
        time.sleep(1.2)
        assert agent.process.poll() is None
        for rank in ranks:
            rank.kill()
        assert agent.process.wait(WAIT_S) == 0


def test_ranks_that_hang_while_no_controller_is_in_reach_are_ended_and_told_as_victims(tmp_path: Path) -> None:
    quick = HangConfig(stopped_s=0.5, idle_s=0.5)
    with serving(tmp_path) as agent:
        agent.start(1, "stop_after_7", quick)
        ranks = agent.started(1)
        agent.until(lambda: any(rank.stopped_s > 1.0 for beat in agent.all(Beat) for rank in beat.ranks))
        assert all(map(lives, ranks)), "while there is one, that is for it to say"
        agent.controller.close()
        assert still_alive(ranks, WAIT_S) == []
        with controlled() as other:
            write_contact(tmp_path, other.url)
            again = Served(agent.process, other, tmp_path)
            again.until(lambda: bool(again.all(Hello)))
            (told,) = again.all(Hello)
    assert told.outcome.is_over
    (failure,) = told.outcome.failures
    assert failure.peer_lost
    assert "has been stopped for" in failure.how
    assert "its node was out of reach for" in failure.how


def test_it_says_why_it_cannot_begin_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    spec = AgentSpec(run=tmp_path, node="n/../x/y", address="127.0.0.1", slots=2, warm_module=FUNCTIONS)
    command = [sys.executable, "-m", AGENT_MODULE, spec.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("256 bytes of shared memory cannot be had in /dev/shm (")
    assert "Traceback" not in done.stderr


def test_a_controller_of_a_lower_term_than_was_promised_is_not_obeyed_and_not_listened_to(tmp_path: Path) -> None:
    with serving(tmp_path, journal_folder=tmp_path / "memory" / "node-0") as agent:
        agent.send(Welcome(term=1))
        agent.start(1)
        ranks = agent.started(1)
        seat = agent.all(Hello)[0].seat
        assert seat is not None
        assert Peers(TOKEN).ask({seat: Vote(launch=0, term=2)})[seat.identity].accepted
        agent.until(lambda: len(agent.all(Hello)) > 1)  # it has given the connection up, and looks for another
        agent.send(End(generation=1))  # before it says its term
        agent.until(lambda: len(agent.all(Hello)) > 2)
        agent.send(Welcome(term=1))
        agent.send(Leave())
        agent.until(lambda: len(agent.all(Hello)) > 3)
        assert all(map(lives, ranks))
        assert agent.process.poll() is None
        agent.send(Welcome(term=2))
        agent.send(Leave())
        assert agent.process.wait(WAIT_S) == 0
        assert not (tmp_path / "memory" / "node-0").exists()

"""The connection of an agent to its controller: found, found again, and refused without the token."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from pydantic import BaseModel

from evermesh.launcher.agent.link import Link, LinkHooks
from evermesh.launcher.agent.loop import Loop
from tests.launcher.agent.listening import TOKEN, controlled

WAIT_S = 10.0


class Word(BaseModel):
    """A message."""

    text: str


class Linked:
    """A link in a loop, and what it told."""

    def __init__(self, find: Callable[[], str | None], token: str = TOKEN) -> None:
        self.loop = Loop()
        self.told: list[str | bytes] = []
        hooks = LinkHooks(lambda: self.told.append("connected"), self.told.append, lambda: self.told.append("lost"))
        self.link = Link(self.loop, "node-7", token, find, hooks)

    def until(self, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < until, self.told
            self.loop.run_until(holds, 0.02)


@contextmanager
def linked(find: Callable[[], str | None], token: str = TOKEN) -> Iterator[Linked]:
    found = Linked(find, token)
    try:
        yield found
    finally:
        found.link.close()
        found.loop.close()


def test_messages_go_both_ways_and_the_agent_names_its_node() -> None:
    with controlled() as controller, linked(lambda: controller.url) as agent:
        agent.until(lambda: agent.told == ["connected"])
        agent.link.send(Word(text="hello"))
        agent.until(lambda: controller.heard == ['{"text":"hello"}'])
        controller.connections[0].send("do this")
        agent.until(lambda: agent.told == ["connected", "do this"])
        assert controller.paths == ["/api/agents/node-7"]
        assert agent.link.lost_since_s is None


def test_a_wrong_token_is_refused_and_tried_again() -> None:
    with controlled() as controller, linked(lambda: controller.url, "wrong") as agent:
        agent.until(lambda: controller.refused >= 2)
        assert agent.told == []
        assert agent.link.lost_since_s is not None


def test_what_is_said_while_there_is_no_connection_is_dropped() -> None:
    url: list[str] = []
    with controlled() as controller, linked(lambda: url[0] if url else None) as agent:
        agent.link.send(Word(text="too early"))
        url.append(controller.url)
        agent.until(lambda: agent.told == ["connected"])
        agent.link.send(Word(text="in time"))
        agent.until(lambda: bool(controller.heard))
        assert controller.heard == ['{"text":"in time"}']


def test_another_controller_at_another_address_is_found() -> None:
    url: list[str] = []
    with linked(lambda: url[-1] if url else None) as agent:
        with controlled() as first:
            url.append(first.url)
            agent.until(lambda: agent.told == ["connected"])
        agent.until(lambda: agent.told == ["connected", "lost"])
        lost_s = agent.link.lost_since_s
        assert lost_s is not None
        with controlled() as second:
            url.append(second.url)
            agent.until(lambda: agent.told == ["connected", "lost", "connected"])
            assert agent.link.lost_since_s is None


def test_since_when_it_is_lost_is_not_forgotten_by_trying_again() -> None:
    with linked(lambda: "http://127.0.0.1:9") as agent:
        began_s = agent.link.lost_since_s
        agent.loop.run_until(lambda: False, 0.5)
        assert agent.link.lost_since_s == began_s
        assert agent.told == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://nosuchhost.invalid:1", "nonsense", "http://127.0.0.1:x"])
def test_an_address_where_nobody_is_ends_nothing(url: str) -> None:
    urls = [url]
    with controlled() as controller, linked(lambda: urls[-1]) as agent:
        agent.loop.run_until(lambda: False, 0.2)
        urls.append(controller.url)
        agent.until(lambda: agent.told == ["connected"])


def test_a_link_closes_at_once_also_while_it_looks_for_the_controller() -> None:
    for find in (lambda: None, lambda: "http://127.0.0.1:9"):
        with linked(find) as agent:
            began_s = time.monotonic()
            agent.link.close()
            assert time.monotonic() - began_s < 1

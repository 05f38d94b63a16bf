"""What an agent missed while it was not connected, it is told when it is back."""

import json
from unittest import mock

from tests.launcher.controller.test_isolation import training
from tests.launcher.controller.worlds import Agent, world


def _asked_when_back(agent: Agent) -> list[str]:
    agent.cut()
    agent.connect()
    told = [json.loads(agent.inbox.get_nowait()) for _ in range(agent.inbox.qsize())]
    return [message["what"] for message in told if message["kind"] == "ask"]


def test_who_was_away_when_a_checkpoint_was_asked_for_is_asked_when_back_until_there_is_one() -> None:
    with world() as job:
        training(job)
        agent = job.agents["node-1"]
        assert _asked_when_back(agent) == []
        agent.cut()
        job.controller.save()
        assert _asked_when_back(agent) == ["save"], "ranks save when all of them were asked"
        assert _asked_when_back(agent) == ["save"]
        with mock.patch("evermesh.launcher.controller.controller.newest_step", return_value=1_000):
            assert _asked_when_back(agent) == []

"""Messages of a pipeline on links where a send ends only when the other side receives, as on NCCL."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from evermesh.parallelism.pipeline import Message, PipelineSchedule
from evermesh.parallelism.pipeline.executor import PipelineExecutor
from evermesh.parallelism.pipeline.links import Activations, Mail
from tests.parallelism.pipeline.test_schedule import SCHEDULES

TOKENS = (2, 0, 5, 1, 3, 0, 0, 4, 2, 1, 6, 3)
PATIENCE_S = 20.0
closing = threading.local()


class _Rendezvous:
    """The n-th message of one link: its send and its receive meet."""

    def __init__(self) -> None:
        self.sent, self.received = threading.Event(), threading.Event()
        self.tensor: Tensor | None = None


class _End:
    """One end of a link, in place of a communicator of two ranks, and the handles that it returns."""

    def __init__(self, meetings: list[_Rendezvous], rank: int) -> None:
        self.meetings, self.rank, self.count = meetings, rank, 0

    def send(self, tensor: Tensor, peer: int, call_site: str) -> Any:
        meeting = self._next(peer)
        meeting.tensor = tensor
        meeting.sent.set()
        return _Sending(meeting)

    def receive(self, tensor: Tensor, peer: int, call_site: str) -> Any:
        meeting = self._next(peer)
        meeting.received.set()
        return _Receiving(meeting, tensor)

    def _next(self, peer: int) -> _Rendezvous:
        assert peer == 1 - self.rank
        self.count += 1
        return self.meetings[self.count - 1]


class _Sending:
    def __init__(self, meeting: _Rendezvous) -> None:
        self.meeting = meeting

    def wait(self) -> None:
        if not getattr(closing, "yes", False):
            assert self.meeting.received.is_set(), "waits for a send that nobody is known to have received"
        assert self.meeting.received.wait(PATIENCE_S), "nobody receives"


class _Receiving:
    def __init__(self, meeting: _Rendezvous, tensor: Tensor) -> None:
        self.meeting, self.tensor = meeting, tensor

    def wait(self) -> None:
        assert self.meeting.sent.wait(PATIENCE_S), "nobody sends"
        assert self.meeting.tensor is not None
        assert self.meeting.tensor.shape == self.tensor.shape, "another message than expected"
        self.tensor.copy_(self.meeting.tensor)


class _Mark:
    """A stage that adds its number, and checks that it gets what the stages before have made of the micro-batch."""

    def __init__(self, stage: int, num_stages: int) -> None:
        self.stage, self.num_stages = stage, num_stages

    def forward(self, micro_batch: int, x_tC: Tensor | None, /) -> Tensor:
        x = torch.full((TOKENS[micro_batch], 1), 100.0 * micro_batch, requires_grad=True) if x_tC is None else x_tC
        assert x.detach().eq(100 * micro_batch + sum(range(self.stage))).all()
        y = x + self.stage
        return y.sum() if self.stage == self.num_stages - 1 else y


def _closes(mail: Mail) -> None:
    closing.yes = True
    try:
        _close(mail)
    finally:
        closing.yes = False


_close = Mail.close


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{s.ranks}x{s.virtual_stages}")
def test_no_rank_waits_for_a_send_and_every_receive_meets_its_message(
    schedule: PipelineSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mail, "close", _closes)
    for number in (0, 1, 3, len(TOKENS)):
        meetings = {link: [_Rendezvous() for _ in range(4 * schedule.num_stages * number)] for link in schedule.links()}

        def run(rank: int, number: int = number, meetings: Any = meetings) -> float:
            links: Any = {
                link: _End(meetings[link], sorted(link).index(rank)) for link in schedule.links() if rank in link
            }
            stages = {stage: _Mark(stage, schedule.num_stages) for stage in schedule.stages_of(rank)}
            activations = Activations(TOKENS[:number], 1, torch.float32, torch.device("cpu"))
            return PipelineExecutor(schedule, rank, links).run(stages, activations).loss.item()

        with ThreadPoolExecutor(schedule.ranks) as pool:
            losses = list(pool.map(run, range(schedule.ranks)))
        last = sum(range(schedule.num_stages))
        expected = sum(tokens * (100 * i + last) for i, tokens in enumerate(TOKENS[:number]))
        assert sum(losses) == expected


def test_one_receive_is_posted_ahead_on_each_link_and_never_more() -> None:
    schedule = PipelineSchedule("1f1b", 2)
    incoming, outgoing = _End([_Rendezvous() for _ in range(3)], 1), _End([], 1)
    for meeting, tokens in zip(incoming.meetings, (2, 5, 1), strict=True):
        meeting.tensor = torch.zeros(tokens, 1)
        meeting.sent.set()
    links: Any = {(0, 1): incoming, (1, 0): outgoing}
    mail = Mail(schedule, 1, Activations((2, 0, 5, 1), 1, torch.float32, torch.device("cpu")), links)
    posted = [incoming.count]
    for micro_batch in range(4):
        mail.receive(Message("forward", 1, micro_batch))
        posted.append(incoming.count)
    assert posted == [1, 2, 2, 3, 3]

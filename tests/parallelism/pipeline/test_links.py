"""Messages of a pipeline on links where a send ends only when the other side receives, as on NCCL."""

import itertools
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


class _WatchedEnd(_End):
    """Notes, on its rank, when a message is sent, when its receive is posted, and when either is waited for."""

    def __init__(self, meetings: list[_Rendezvous], rank: int, messages: list[Message], events: list[Any]) -> None:
        super().__init__(meetings, rank)
        self.messages, self.events = messages, events

    def send(self, tensor: Tensor, peer: int, call_site: str) -> Any:
        return self._noted(super().send(tensor, peer, call_site), "sends")

    def receive(self, tensor: Tensor, peer: int, call_site: str) -> Any:
        return self._noted(super().receive(tensor, peer, call_site), "posts")

    def _noted(self, handle: Any, what: str) -> Any:
        message, wait = self.messages[self.count - 1], handle.wait
        self.events.append((what, message))

        def noted_wait() -> None:
            self.events.append(("has sent" if what == "sends" else "takes", message))
            wait()

        handle.wait = noted_wait
        return handle


class _WatchedStage(_Mark):
    """Notes when it computes."""

    def __init__(self, stage: int, num_stages: int, events: list[Any]) -> None:
        super().__init__(stage, num_stages)
        self.events = events

    def forward(self, micro_batch: int, x_tC: Tensor | None, /) -> Tensor:
        self.events.append(("computes", ("forward", self.stage, micro_batch)))
        y = super().forward(micro_batch, x_tC)
        y.register_hook(lambda _: self.events.append(("computes", ("backward", self.stage, micro_batch))))
        return y


def _watched(schedule: PipelineSchedule, number: int) -> list[list[Any]]:
    """What happens on every rank of a pipeline."""
    orders = [schedule.actions(rank, number) for rank in range(schedule.ranks)]

    def messages_of(link: tuple[int, int]) -> list[Message]:
        sent = (schedule.sent(action) for action in orders[link[0]])
        return [m for m in sent if m and schedule.rank_of(m.stage) == link[1] and TOKENS[m.micro_batch]]

    messages = {link: messages_of(link) for link in schedule.links()}
    meetings = {link: [_Rendezvous() for _ in messages[link]] for link in schedule.links()}

    def run(rank: int) -> list[Any]:
        events: list[Any] = []
        links: Any = {
            link: _WatchedEnd(meetings[link], sorted(link).index(rank), messages[link], events)
            for link in schedule.links()
            if rank in link
        }
        stages = {stage: _WatchedStage(stage, schedule.num_stages, events) for stage in schedule.stages_of(rank)}
        activations = Activations(TOKENS[:number], 1, torch.float32, torch.device("cpu"))
        PipelineExecutor(schedule, rank, links).run(stages, activations)
        return events

    with ThreadPoolExecutor(schedule.ranks) as pool:
        return list(pool.map(run, range(schedule.ranks)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{s.ranks}x{s.virtual_stages}")
def test_while_a_rank_computes_each_link_can_bring_what_is_needed_next(
    schedule: PipelineSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mail, "close", _closes)
    for events in _watched(schedule, len(TOKENS)):
        taken = [(index, message) for index, (what, message) in enumerate(events) if what == "takes"]
        posted = {message: index for index, (what, message) in enumerate(events) if what == "posts"}
        computes = [index for index, (what, _) in enumerate(events) if what == "computes"]
        assert len(taken) == len(posted)
        for sender in {schedule.sender(message) for _, message in taken}:
            from_sender = [(index, message) for index, message in taken if schedule.sender(message) == sender]
            assert posted[from_sender[0][1]] < computes[0], "before anything is computed"
            for (before, _), (_, message) in itertools.pairwise(from_sender):
                assert posted[message] < min(index for index in computes if index > before)


def test_a_pipeline_that_fills_and_drains_computes_while_messages_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """1F1B on two ranks; the first takes a gradient when it needs it, and waits for sends that are known to have arrived."""
    monkeypatch.setattr(Mail, "close", _closes)
    monkeypatch.setattr(f"{__name__}.TOKENS", (2, 5, 1))
    first, second = _watched(PipelineSchedule("1f1b", 2), 3)
    activations = [Message("forward", 1, micro_batch) for micro_batch in range(3)]
    gradients = [Message("backward", 0, micro_batch) for micro_batch in range(3)]
    assert first == [
        ("posts", gradients[0]),
        ("computes", ("forward", 0, 0)),
        ("sends", activations[0]),
        ("computes", ("forward", 0, 1)),
        ("sends", activations[1]),
        ("takes", gradients[0]),
        ("posts", gradients[1]),
        ("has sent", activations[0]),
        ("computes", ("backward", 0, 0)),
        ("computes", ("forward", 0, 2)),
        ("sends", activations[2]),
        ("takes", gradients[1]),
        ("posts", gradients[2]),
        ("has sent", activations[1]),
        ("computes", ("backward", 0, 1)),
        ("takes", gradients[2]),
        ("has sent", activations[2]),
        ("computes", ("backward", 0, 2)),
    ]
    assert second[:6] == [
        ("posts", activations[0]),
        ("takes", activations[0]),
        ("posts", activations[1]),
        ("computes", ("forward", 1, 0)),
        ("computes", ("backward", 1, 0)),
        ("sends", gradients[0]),
    ]


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

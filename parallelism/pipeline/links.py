"""How activations and their gradients travel between the ranks of a pipeline.

Why nobody waits for ever, with the semantics of NCCL, where a send ends only when the other side receives, and where
operations on one communicator run one after the other in the order in which they were issued:

- Every link, that is every (sender, receiver), has a communicator of its own, and messages go through it one way. A
  forward and a backward message between two ranks, or a message from the rank before and one to the rank behind, are
  never on the same communicator, so neither can stand in the other's way. (On one communicator "send activation 2,
  receive gradient 0" here and "send gradient 0, receive activation 2" there wait for each other.)
- On a link, receives are posted in the order in which the *sender* sends; both ends know it, because the order of every
  rank is data. What is needed later but sent earlier is received earlier and kept. So the n-th send meets the n-th receive,
  also where messages of two pairs of stages share a link.
- A send never blocks the sender: its buffer is kept until the receiver is known to have it. A receive never blocks either
  before an action needs it, and was posted by then. So the message that an action waits for needs only that its sender
  got as far as sending it, and a pipeline whose order has no circle with blocking receives (``verifier``, and the tests of
  ``schedule``) runs.
- The first use of an NCCL communicator waits, on the host, for the other side. Receives are posted ahead of what the
  other side waits for, so all links are opened before, in one order that all ranks know (``open_links``).

Sends and receives are apart, so while an action computes, what it will be handed next over every link can arrive, and what
was sent before can leave: also while the pipeline fills and drains (MegaScale, arXiv 2402.15627, section 3.2). A receive that
is posted ahead holds a buffer and, on a GPU, a waiting kernel: on each link one for the message that is needed next, and
those for what its sender sends before that one.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.pipeline.schedule import Message, PipelineSchedule

Links = Mapping[tuple[int, int], Communicator]
"""This rank's part of ``schedule.links``: by (sender, receiver), pipeline ranks, a group of these two, ascending."""
CALL_SITES = {"forward": "pipeline forward", "backward": "pipeline backward"}


@dataclass(frozen=True, slots=True)
class Activations:
    """What travels between two stages: [t, C] for the t tokens of each micro-batch, without the tokens of other ranks."""

    num_tokens: tuple[int, ...]
    """Of every micro-batch of the step, zero allowed; the same on all ranks of the pipeline."""
    width: int
    dtype: torch.dtype
    device: torch.device

    def buffer(self, micro_batch: int) -> Tensor:
        """Room for one."""
        return torch.empty(self.num_tokens[micro_batch], self.width, dtype=self.dtype, device=self.device)


def open_links(links: Links, device: torch.device) -> None:
    """Let a byte through every link, so that later messages only wait for each other. Collective over the pipeline."""
    for (sender, receiver), communicator in sorted(links.items(), key=lambda item: item[0]):
        first_of_pair = communicator.rank == 0
        sends = first_of_pair == (sender < receiver)
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        operation = communicator.send if sends else communicator.receive
        operation(byte, 1 - communicator.rank, "pipeline opening").wait()


class Mail:
    """The messages of one rank in one step.

    A message without tokens is not sent; who receives it makes it himself. Between two stages of one rank a message is
    handed over as it is.

    Args:
        schedule: of the pipeline.
        rank: this rank.
        activations: sizes of the messages.
        links: of this rank.
    """

    def __init__(self, schedule: PipelineSchedule, rank: int, activations: Activations, links: Links) -> None:
        self._schedule, self._rank, self._activations, self._links = schedule, rank, activations, links
        self._expected: dict[int, deque[Message]] = {}
        """What each peer sends and no receive is posted for, in the order in which it sends."""
        self._needed: dict[int, deque[Message]] = {}
        """What was not taken yet of each peer, in the order in which this rank needs it."""
        self._proves: dict[Message, list[Message]] = {}
        for peer in (sender for sender, receiver in links if receiver == rank):
            self._expected[peer], self._needed[peer] = self._look_at(peer), self._needs_of(peer)
        self._incoming: dict[Message, tuple[Tensor, Any]] = {}
        self._leaving: dict[Message, tuple[Tensor, Any]] = {}
        self._handed_over: dict[Message, Tensor] = {}
        for peer in self._expected:
            self._post_ahead(peer)

    def _look_at(self, peer: int) -> "deque[Message]":
        """What ``peer`` sends to this rank, in its order; also which of our messages each of these proves to have arrived."""
        messages: deque[Message] = deque()
        arrived: list[Message] = []
        for action in self._schedule.actions(peer, len(self._activations.num_tokens)):
            received, sent = self._schedule.received(action), self._schedule.sent(action)
            if received is not None and self._schedule.sender(received) == self._rank:
                arrived.append(received)
            if sent is not None and self._schedule.rank_of(sent.stage) == self._rank and self._has_tokens(sent):
                messages.append(sent)
                self._proves[sent], arrived = arrived, []
        return messages

    def _needs_of(self, peer: int) -> "deque[Message]":
        """What this rank receives from ``peer``, in the order of its own actions."""
        actions = self._schedule.actions(self._rank, len(self._activations.num_tokens))
        received = (self._schedule.received(action) for action in actions)
        return deque(
            message
            for message in received
            if message is not None and self._schedule.sender(message) == peer and self._has_tokens(message)
        )

    def send(self, message: Message, tensor: Tensor) -> None:
        """Hand ``message`` on; does not wait."""
        receiver = self._schedule.rank_of(message.stage)
        if receiver == self._rank:
            self._handed_over[message] = tensor
        elif self._has_tokens(message):
            communicator = self._links[self._rank, receiver]
            tensor = tensor.contiguous()
            work = communicator.send(tensor, 1 - communicator.rank, CALL_SITES[message.direction])
            self._leaving[message] = tensor, work

    def receive(self, message: Message) -> Tensor:
        """The content of ``message``, [t, C], the next that is needed of its sender; waits for it."""
        sender = self._schedule.sender(message)
        if sender == self._rank:
            return self._handed_over.pop(message)
        if not self._has_tokens(message):
            return self._activations.buffer(message.micro_batch)
        needed = self._needed[sender].popleft()
        assert needed == message, f"{message} is taken before {needed}"
        tensor, work = self._incoming.pop(message)
        work.wait()
        self._post_ahead(sender)
        for arrived in self._proves.pop(message):
            self._forget(arrived)
        return tensor

    def close(self) -> None:
        """Return when everything that was sent has left."""
        waiting = (self._incoming, self._handed_over, *self._expected.values(), *self._needed.values())
        assert not any(waiting), "messages that nobody needed"
        for message in list(self._leaving):
            self._forget(message)

    def _forget(self, message: Message) -> None:
        if message in self._leaving:  # one without tokens was never sent
            self._leaving.pop(message)[1].wait()

    def _post_ahead(self, sender: int) -> None:
        """Post the receive of what is needed next of ``sender``, and of what it sends before."""
        while self._needed[sender] and self._needed[sender][0] not in self._incoming:
            message = self._expected[sender].popleft()
            buffer = self._activations.buffer(message.micro_batch)
            communicator = self._links[sender, self._rank]
            work = communicator.receive(buffer, 1 - communicator.rank, CALL_SITES[message.direction])
            self._incoming[message] = buffer, work

    def _has_tokens(self, message: Message) -> bool:
        return self._activations.num_tokens[message.micro_batch] > 0


__all__ = ["CALL_SITES", "Activations", "Links", "Mail", "open_links"]

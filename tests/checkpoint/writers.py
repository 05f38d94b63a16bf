"""Writers without trainers: processes that are forked from one thread, and write states of ``tests.checkpoint.states``.

They meet in the directory alone, so nothing else of a training run is needed to kill them at any system call.
"""

import os
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evermesh.checkpoint.background.orders import SaveOrder, WriterPlan
from evermesh.checkpoint.background.planning import writer_plan
from evermesh.checkpoint.background.writer import Writer, serve
from evermesh.checkpoint.file_plan import planned_parts
from evermesh.checkpoint.retention import Retention
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.tensors import byte_view, held_tensor
from tests.checkpoint.killing import Calls, Kill
from tests.checkpoint.states import held_by, logical_state, shard_map

_LOOK_S = 0.002
_GRACE_S = 20.0


@dataclass(frozen=True)
class Orphan(Kill):
    """The trainer ends at that call, not the writer."""


def plan_and_arena(
    whole: ShardMap,
    held: Mapping[str, Sequence[torch.Tensor]],
    rank: int,
    size: int,
    directory: Path,
    retention: Retention | None = None,
    *,
    incremental: bool = False,
    parity: int | None = None,
) -> tuple[WriterPlan, bytearray]:
    """What a trainer that holds ``held`` tells its writer, and what it copies."""
    planned = planned_parts(whole, rank)
    plan = writer_plan(whole, planned, rank, size, directory, retention or Retention(1), incremental, parity)
    arena = bytearray()
    for one in planned:
        flat = held_tensor(held, one.part.name, one.part.held).reshape(-1)[one.part.start : one.part.stop]
        arena += byte_view(flat.contiguous()).tobytes()
    return plan, arena


def write_state(
    directory: Path, step: int, state: int, size: int, kills: Mapping[int, Kill], parity: int | None = None
) -> bool:
    """Save as ``size`` writers do, some of which die; once one has died the others are killed, as their trainers do.

    Returns whether rank 0 told of a commit. In a process of one thread.
    """
    identity = secrets.token_hex(4)
    receiver, sender = os.pipe()
    children = {
        rank: _fork(directory, step, _Part(state, rank, size, parity), identity, kills.get(rank), sender)
        for rank in range(size)
    }
    os.close(sender)
    deadline_s = time.monotonic() + _GRACE_S
    while children:
        codes = {rank: _exit_code(child) for rank, child in children.items()}
        children = {rank: child for rank, child in children.items() if codes[rank] is None}
        has_lost = any(code is not None and (code or rank in kills) for rank, code in codes.items())
        if has_lost or time.monotonic() > deadline_s:
            for child in children.values():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            break
        time.sleep(_LOOK_S)
    with open(receiver, "rb") as answers:
        return b'"committed"' in answers.read()


def _exit_code(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


@dataclass(frozen=True)
class _Part:
    """What one of several writers saves."""

    state: int
    rank: int
    size: int
    parity: int | None


def _fork(directory: Path, step: int, part: _Part, identity: str, kill: Kill | None, answers: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            _write(directory, step, part, identity, kill, answers)
        finally:
            os._exit(1)  # not reached: a writer ends with its trainer, or is killed
    return child


def _write(directory: Path, step: int, part: _Part, identity: str, kill: Kill | None, answers: int) -> None:
    """A writer and, in the same process, as much of its trainer as sends an order and takes the last answer."""
    held = held_by(part.rank, part.size, logical_state(part.state))
    plan, arena = plan_and_arena(shard_map(part.size), held, part.rank, part.size, directory, parity=part.parity)
    objects: dict[str, Any] = {"cursor": part.state}
    receiver, sender = os.pipe()
    os.write(sender, plan.to_json() + SaveOrder(identity, step, objects, {}).to_json())
    save = Writer.save

    def save_and_end(writer: Writer, order: SaveOrder) -> None:
        save(writer, order)
        os.close(sender)

    Writer.save = save_and_end  # type: ignore[method-assign,assignment]  # in this process only
    (_Orphaned(kill, sender) if isinstance(kill, Orphan) else Calls(kill)).install()
    serve(receiver, answers, memoryview(arena))


class _Orphaned(Calls):
    """Closes the pipe of the trainer at one call, and goes on as far as it is let."""

    def __init__(self, kill: Kill, sender: int) -> None:
        super().__init__(kill)
        self._sender = sender

    def die(self) -> None:
        os.close(self._sender)
        time.sleep(0.05)  # a writer that may end does so meanwhile

"""How ranks learn that one of them failed, where a plain barrier would let the others wait or go on."""

from collections.abc import Callable
from typing import TypeVar

import torch
from pydantic import TypeAdapter

from evermesh.parallelism.collectives import Communicator

T = TypeVar("T")
_CALL_SITE = "checkpoint"
_Cause = TypeAdapter(tuple[str, int | None])


class RankFailure(Exception):
    """Some rank failed; raised on all of them. ``cause`` is its error as text, ``errno`` that of an ``OSError``."""

    def __init__(self, rank: int, cause: str, errno: int | None) -> None:
        super().__init__(f"rank {rank}: {cause}")
        self.rank, self.cause, self.errno = rank, cause, errno


def together(communicator: Communicator, work: Callable[[], T]) -> T:
    """Do ``work`` and return its result when every rank has done its own.

    Collective; a barrier. The communicator takes tensors on the host.

    Raises:
        RankFailure: on every rank, if any of them raised; it tells about the lowest.
    """
    result, error = _attempt(work)
    failed = torch.tensor([communicator.size - communicator.rank if error is not None else 0], dtype=torch.int64)
    communicator.all_reduce(failed, _CALL_SITE, maximum=True)
    if not int(failed):
        return result[0]
    source = communicator.size - int(failed)
    payload = _Cause.dump_json(_cause_of(error)) if communicator.rank == source else None
    cause, errno = _Cause.validate_json(communicator.broadcast_bytes(payload, source, _CALL_SITE))
    raise RankFailure(source, cause, errno) from error


def _attempt(work: Callable[[], T]) -> tuple[list[T], Exception | None]:
    try:
        return [work()], None
    except Exception as error:  # noqa: BLE001  supervision boundary: the other ranks must hear of it; raised by `together`
        return [], error


def _cause_of(error: Exception | None) -> tuple[str, int | None]:
    assert error is not None
    return f"{type(error).__name__}: {error}", error.errno if isinstance(error, OSError) else None

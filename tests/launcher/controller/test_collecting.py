"""What is kept out of garbage collections."""

import asyncio
import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from evermesh.launcher.controller.collecting import spare_collections
from evermesh.launcher.controller.status import JobState

_LOOK_S = 0.001


@dataclass
class Job:
    state: JobState
    generation: int = 1


class Cycle:
    def __init__(self) -> None:
        self.me: Any = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_alive_when_an_attempt_trains_is_left_out_until_the_next_one_trains() -> None:
    asyncio.run(_train_twice())


async def _train_twice() -> None:
    job, cycle = Job("starting"), Cycle()
    known = weakref.ref(cycle)
    sparing = asyncio.create_task(spare_collections(job, _LOOK_S))
    await asyncio.sleep(10 * _LOOK_S)
    assert gc.get_freeze_count() == 0
    job.state = "training"
    await asyncio.sleep(10 * _LOOK_S)
    del cycle
    gc.collect()
    assert known() is not None
    assert gc.get_freeze_count() > 1000
    job.generation = 2
    await asyncio.sleep(10 * _LOOK_S)
    assert known() is None
    sparing.cancel()
    with suppress(asyncio.CancelledError):
        await sparing

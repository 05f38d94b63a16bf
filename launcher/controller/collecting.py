"""What lives as long as an attempt is kept out of Python's garbage collections, which hold every message up.

Of 1,000 nodes a full collection takes a quarter of a second, and one comes every few seconds: each beat leaves something
behind that is looked at then, and with it everything that has been there for hours.
"""

import asyncio
import gc
from typing import Protocol

from evermesh.launcher.controller.status import JobState

_LOOK_S = 1.0


class Attempted(Protocol):
    """A controller, as far as it is needed here."""

    @property
    def state(self) -> JobState:
        """Of the job."""

    @property
    def generation(self) -> int:
        """Number of the attempt."""


async def spare_collections(controller: Attempted, look_s: float = _LOOK_S) -> None:
    """Until cancelled: collect once when the ranks of an attempt train, and leave what is alive then out of later
    collections.

    It is freed by its last reference, and cycles of it when the next attempt trains. Only for a process of its own.
    """
    seen = 0
    while True:
        if controller.state == "training" and controller.generation != seen:
            seen = controller.generation
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        await asyncio.sleep(look_s)

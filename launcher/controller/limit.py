"""The time limit of a place: the job saves and stops before its nodes are taken away."""

import asyncio
import signal
from typing import Protocol

_MARGIN_S = 10.0
"""Between the end of the time to save and the limit: agents leave, and the command that shows the job closes it."""
_LOOK_AGAIN_S = 60.0
"""How often the limit is asked for: it may be moved."""


class Limited(Protocol):
    """A place, as far as it is needed here."""

    def time_left_s(self) -> float | None:
        """Seconds until it takes the nodes away; None: it does not."""


class Stoppable(Protocol):
    """A controller, as far as it is needed here."""

    def stop(self, number: int, *, at_once: bool, grace_s: float | None) -> None:
        """Somebody wants the job to end."""


async def stop_in_time(controller: Stoppable, placement: Limited, grace_s: float) -> None:
    """Stop the job, as SIGTERM would, when ``grace_s`` and a margin are left; return then, or where there is no limit."""
    while (left_s := await asyncio.to_thread(placement.time_left_s)) is not None:
        early_s = left_s - grace_s - _MARGIN_S
        if early_s <= 0:
            print(f"{left_s:.0f} s are left until the time limit: stopping", flush=True)
            controller.stop(signal.SIGTERM, at_once=False, grace_s=max(0.0, min(grace_s, left_s - _MARGIN_S)))
            return
        await asyncio.sleep(min(early_s, _LOOK_AGAIN_S))

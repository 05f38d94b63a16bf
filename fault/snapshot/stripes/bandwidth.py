"""A bound on the bytes that are sent per second, so that training keeps its network."""

import time
from collections.abc import Callable


class TokenBucket:
    """Lets ``bytes_per_s`` pass on average, and a burst of a tenth of a second at once; None: everything.

    A sender that finds tokens may take more than there are and waits for it afterwards: no send is too large.
    """

    def __init__(self, bytes_per_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = bytes_per_s, clock
        self._burst = (bytes_per_s or 0.0) / 10
        self._tokens, self._counted_s = self._burst, clock()

    def wait_s(self) -> float:
        """Seconds until something may be sent; 0 for now."""
        if self._rate is None:
            return 0.0
        now_s = self._clock()
        self._tokens = min(self._tokens + (now_s - self._counted_s) * self._rate, self._burst)
        self._counted_s = now_s
        return 0.0 if self._tokens > 0 else -self._tokens / self._rate + 1 / self._rate

    def take(self, num_bytes: int) -> None:
        """Count bytes that were sent."""
        self._tokens -= num_bytes

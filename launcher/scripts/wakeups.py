"""One descriptor that becomes readable when anything happens that is not the ranks' doing: a signal, another node."""

import selectors
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self


class HasDescriptor(Protocol):
    """A socket, or a descriptor itself."""

    def fileno(self) -> int: ...


class Wakeups:
    """Descriptors and what to call when they have something to read."""

    def __init__(self) -> None:
        self._selector = selectors.EpollSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._selector.close()

    def fileno(self) -> int:
        """Readable while any of them is: an epoll descriptor can itself be waited for."""
        return self._selector.fileno()

    def add(self, source: HasDescriptor | int, call: Callable[[], None]) -> None:
        """Call this whenever ``source`` has something to read."""
        self._selector.register(source, selectors.EVENT_READ, call)

    def remove(self, source: HasDescriptor | int) -> None:
        """Forget it; before it is closed."""
        self._selector.unregister(source)

    def take(self, timeout_s: float = 0.0) -> None:
        """Wait so long for something to happen, and call whom it concerns."""
        for key, _ in self._selector.select(timeout_s):
            key.data()

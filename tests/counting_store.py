"""A rendezvous store that writes down what it is asked for, on behalf of one rank."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class CountingStore(dist.Store):
    """Passes everything on to ``store``; ``asked`` has operation, key and bytes of everything, in order."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store = store
        self.asked: list[tuple[str, str, int]] = []

    @property
    def counts(self) -> dict[str, int]:
        """How often each operation was asked for; one for several keys counts as so many."""
        return dict(Counter(operation for operation, _, _ in self.asked))

    # what torch calls

    def clone(self) -> "CountingStore":
        return self

    def set(self, key: str, value: Any) -> None:
        self._note("set", key, value)
        self._store.set(key, value)

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        self._note("compare_set", key, desired)
        found: bytes = self._store.compare_set(key, expected, desired)
        return found

    def get(self, key: str) -> bytes:
        found = self._store.get(key)
        self._note("get", key, found)
        return found

    def add(self, key: str, amount: int) -> int:
        self._note("add", key, b"")
        return self._store.add(key, amount)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._note("wait", key, b"")
        self._store.wait(list(keys), *([timeout] if timeout is not None else []))

    def check(self, keys: Sequence[str]) -> bool:
        for key in keys:
            self._note("check", key, b"")
        return self._store.check(list(keys))

    def delete_key(self, key: str) -> bool:
        self._note("delete_key", key, b"")
        return self._store.delete_key(key)

    def num_keys(self) -> int:
        return self._store.num_keys()

    def has_extended_api(self) -> bool:
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    def _note(self, operation: str, key: str, value: Any) -> None:
        self.asked.append((operation, key, len(value)))

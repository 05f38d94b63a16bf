"""What people are told about the protection of snapshots: once per change, not once per snapshot."""

from collections.abc import Collection
from typing import NamedTuple

from evermesh.launcher.controller.scribe import Scribe
from evermesh.launcher.controller.status import Standing
from evermesh.launcher.messages import KeeperTells


class NamedStripe(NamedTuple):
    """A stripe with the nodes that take part now."""

    number: int
    nodes: tuple[str, ...]
    code: str | None

    def __str__(self) -> str:
        return f"stripe {self.number} ({', '.join(self.nodes)}; code {self.code or 'none'})"


class Protection:
    """Which stripes protect their newest snapshot, as keepers tell."""

    def __init__(self, scribe: Scribe) -> None:
        self._scribe = scribe
        self._standing: dict[int, dict[str, KeeperTells]] = {}
        self._is_protected: dict[int, bool] = {}
        """By number of the stripe, as it was told last."""

    def standing(self, stripes: Collection[int]) -> Standing:
        """Of so many stripes together, by number."""
        told = [self._is_protected.get(number) for number in stripes]
        if False in told:
            return "degraded"
        return "protected" if told and None not in told else "none"

    def note(self, stripe: NamedStripe, node: str, told: KeeperTells) -> None:
        """A keeper of this stripe has protected a snapshot, or has not. Another one is needed for that to be told again."""
        standing = self._standing.setdefault(stripe.number, {})
        standing[node] = told
        unprotected = {name: one.text for name, one in standing.items() if not one.ok}
        if unprotected:
            self._change(stripe, told, self._degraded(stripe, unprotected), is_protected=False)
        elif len(standing) == len(stripe.nodes):
            tolerated = (stripe.code or "+0").partition("+")[2]
            text = f"{stripe} protects step {told.step}: {tolerated} of its nodes can be lost without a read of storage"
            figures = _figures(standing.values(), int(tolerated))
            self._change(stripe, told, text + _coded(**figures), is_protected=True, **figures)

    def _change(self, stripe: NamedStripe, told: KeeperTells, text: str, *, is_protected: bool, **figures: int) -> None:
        if self._is_protected.get(stripe.number) == is_protected:
            return
        self._is_protected[stripe.number] = is_protected
        kind = "snapshots protected" if is_protected else "snapshots degraded"
        self._scribe.tell(kind, text, step=told.step, stripe=stripe.number, **figures)

    @staticmethod
    def _degraded(stripe: NamedStripe, unprotected: dict[str, str]) -> str:
        why = "; ".join(f"{name}: {text}" for name, text in sorted(unprotected.items()))
        return f"{stripe} does not protect its newest snapshot, which a lost node would cost; training goes on. {why}"


def _figures(told: Collection[KeeperTells], parity: int) -> dict[str, int]:
    """Of all nodes of a stripe together; every one sends what it codes to as many others as the code has parity parts."""
    coded_bytes = sum(one.coded_bytes for one in told)
    return {
        "data_bytes": sum(one.data_bytes for one in told),
        "coded_bytes": coded_bytes,
        "sent_bytes": coded_bytes * parity,
        "parity_bytes": sum(one.parity_bytes for one in told),
    }


def _coded(data_bytes: int, coded_bytes: int, sent_bytes: int, parity_bytes: int) -> str:
    return (
        f". Of {data_bytes:,} bytes {coded_bytes:,} are coded, of the rest there are copies; {sent_bytes:,} were sent, "
        f"parity takes {parity_bytes:,}"
    )

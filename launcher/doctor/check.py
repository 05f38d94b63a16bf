"""One thing that was looked at."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["good", "worse", "bad"]
"""Works; works less well than it could; does not work."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was found, and what to do where that is not good."""

    section: str
    name: str
    state: State
    fact: str
    way_out: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def exit_code(checks: list[Check]) -> int:
    """0: nothing is bad; 1: something is."""
    return int(any(check.state == "bad" for check in checks))

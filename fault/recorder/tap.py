"""What the recorder asks of whatever sees the collectives of a rank."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Tap(Protocol):
    """Writes a record of every collective and message of this process into its ring."""

    tier: str
    """One of ``ring_format.TIERS``."""

    def install(self) -> None:
        """Begin to see. Raises TapUnusable if it cannot."""

    def restore(self) -> None:
        """Leave torch as it was; no collective is under way. A fork of the process only calls ``mute``."""

    def mute(self) -> None:
        """Write nothing any more."""

    def introduce(self, group: "ProcessGroup") -> int:
        """The index of a group, which it is given when it is first seen."""

    def append_name(self, line: bytes) -> None:
        """Append a line to the names."""

    def announce(self, site: int, moment: int) -> None:
        """The next operation of this thread is issued at ``site`` by somebody who stands at ``moment``, packed."""

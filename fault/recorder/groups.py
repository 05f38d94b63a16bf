"""Hears of every process group at the moment it is made, with its ranks: torch enters it into a dictionary of its own."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Listener = Callable[["ProcessGroup", tuple[int, ...]], None]
_NAME = "_pg_group_ranks"


class _Watched(dict[Any, Any]):
    """The dictionary, in which whatever is entered is told to ``listener``."""

    listener: Listener | None = None

    def __setitem__(self, group: Any, ranks: Any) -> None:
        super().__setitem__(group, ranks)
        _tell(self.listener, group, ranks)


class GroupWatch:
    """Tells ``listener`` of every group there is, and of every one that is made, until ``restore``.

    Where torch keeps no such dictionary any more (it is no public interface) nothing is told: groups have no ranks then.
    """

    def __init__(self, listener: Listener) -> None:
        import torch.distributed.distributed_c10d as module

        self._module: Any = module
        before: Any = getattr(module, _NAME, None)
        self.is_possible = type(before) is dict
        if not self.is_possible:
            return
        watched = _Watched(before)
        watched.listener = listener
        setattr(module, _NAME, watched)
        for group, ranks in list(watched.items()):
            _tell(listener, group, ranks)

    def restore(self) -> None:
        """Put a plain dictionary back."""
        watched = getattr(self._module, _NAME, None)
        if isinstance(watched, _Watched):
            watched.listener = None
            setattr(self._module, _NAME, dict(watched))


def _tell(listener: Listener | None, group: Any, ranks: Any) -> None:
    if listener is not None and hasattr(group, "group_name"):  # torch enters a number for groups of other ranks
        in_order = sorted(ranks, key=ranks.__getitem__)
        listener(group, tuple(int(rank) for rank in in_order))


def description_of(group: "ProcessGroup") -> str:
    """What its maker called it; torch's own word for none is left out."""
    text = str(getattr(group, "group_desc", ""))
    return "" if text == "undefined" else text

"""Moving tensors from one shard map to another through memory, among the ranks of a running job."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermesh.checkpoint.relayout.moving import Carrier, Holding, Moved, relayout

__all__ = ["Carrier", "Holding", "Moved", "relayout"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from evermesh.checkpoint.relayout import moving  # with torch, which plans do not need

    return getattr(moving, name)

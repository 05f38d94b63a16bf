"""Any causal decoder of transformers, unedited, on every batch's own parallel plan.

Names that need torch are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermesh.runtime.own_model.joining import start
    from evermesh.runtime.own_model.module import ParallelModule, parallelize
    from evermesh.runtime.own_model.state import read_weights

_MODULES = {"ParallelModule": "module", "parallelize": "module", "read_weights": "state", "start": "joining"}

__all__ = ["ParallelModule", "parallelize", "read_weights", "start"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

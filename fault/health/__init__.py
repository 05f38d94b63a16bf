"""Whether a node is fit for a job: host, GPUs, and short tests; before a job, and slowly while it runs.

Names are imported when they are first used, so that the process that looks starts fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermesh.fault.health.looking import Places, Watch
    from evermesh.fault.health.verdicts import State, Verdict, changed, exit_code, worst

__all__ = ["Places", "State", "Verdict", "Watch", "changed", "exit_code", "worst"]
_LOOKING = ("Places", "Watch")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    home = "looking" if name in _LOOKING else "verdicts"
    value = getattr(importlib.import_module(f"evermesh.fault.health.{home}"), name)
    globals()[name] = value
    return value

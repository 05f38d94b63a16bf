"""From records of collectives to findings: which rank, node or link is at fault, and who is not.

Names are imported when they are first used: the kinds of findings are needed where no loop is compiled.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermesh.fault.detectors.context import Context, Offset
    from evermesh.fault.detectors.diagnosing import Diagnosis, diagnose
    from evermesh.fault.detectors.expected import planned_work

__all__ = ["Context", "Diagnosis", "Offset", "diagnose", "planned_work"]
_HOMES = {
    "Context": "context",
    "Diagnosis": "diagnosing",
    "Offset": "context",
    "diagnose": "diagnosing",
    "planned_work": "expected",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"evermesh.fault.detectors.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

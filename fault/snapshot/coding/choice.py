"""Which engine computes, and why not a better one."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from evermesh.fault.snapshot.coding import isal
from evermesh.fault.snapshot.coding.engine import Engine, NumpyEngine
from evermesh.fault.snapshot.coding.errors import EngineUnusable


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine, and what a report says about it."""

    engine: Engine
    where: str
    """The library it calls."""
    why_not_better: str | None
    """Why the faster engine is not used; None where this is it."""

    def __str__(self) -> str:
        reason = f"; not isal: {self.why_not_better}" if self.why_not_better else ""
        return f"erasure codes: {self.engine.name} ({self.where}){reason}"


@cache
def choose_engine(wanted: Literal["auto", "isal", "numpy"] = "auto") -> EngineChoice:
    """The engine of this process, looked for once.

    Raises:
        EngineUnusable: ``isal`` was wanted and does not work.
    """
    if wanted == "numpy":
        return EngineChoice(NumpyEngine(), "numpy", "numpy was asked for")
    try:
        engine = isal.load()
    except EngineUnusable as error:
        if wanted == "isal":
            raise
        return EngineChoice(NumpyEngine(), "numpy", str(error))
    return EngineChoice(engine, engine.where, None)

"""Compiles the planner's loops with numba, or leaves them to Python: the results are the same, bit for bit.

The loops use numbers, NumPy arrays and tuples only. Costs enter as integer ticks, so that no result depends on the order of
additions. Machine code is cached, so that only the first process compiles; a cache belongs to one state of the planner's
sources, because numba looks at the file of a function only, not at those of the functions it calls.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

config: Any = numba.config
F = TypeVar("F", bound=Callable[..., Any])

COMPILED = os.environ.get("EVERMESH_PLANNER", "compiled") != "python"
"""Whether the loops are compiled; set EVERMESH_PLANNER to ``python`` before the first import to leave them to Python."""


def compiled(function: F) -> F:
    """``function``, compiled when first called; it does not hold the interpreter's lock while it runs."""
    if not COMPILED:
        return function
    before, config.CACHE_DIR = config.CACHE_DIR, _CACHE
    try:
        return numba.njit(cache=True, nogil=True)(function)  # type: ignore[return-value]
    finally:
        config.CACHE_DIR = before


def is_cached(module: str) -> bool:
    """Whether another process, or this one, has left machine code of the loops of ``module`` (its last name)."""
    return bool(_CACHE) and any(Path(_CACHE).rglob(f"{module}.*.nbi"))


def _cache_folder() -> str:
    """Beside the sources if that can be written, else where NUMBA_CACHE_DIR or the user's cache is."""
    sources = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(sources.rglob("*.py")):
        digest.update(path.read_bytes())
    user_cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    bases = [
        sources / "__pycache__",
        Path(user_cache) / "evermesh",
        Path(tempfile.gettempdir()) / f"evermesh-{os.getuid()}",
    ]
    if config.CACHE_DIR:
        bases.insert(0, Path(config.CACHE_DIR))
    for base in bases:
        try:
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(base, os.W_OK) and base.stat().st_uid == os.getuid():
            return str(base / f"planner-{digest.hexdigest()}")
    return ""


_CACHE = _cache_folder() if COMPILED else ""


__all__ = ["COMPILED", "compiled", "is_cached"]

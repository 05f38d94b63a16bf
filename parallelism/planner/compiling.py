"""Compiles the planner's loops with numba, or leaves them to Python: the results are the same, bit for bit.

The loops use numbers, NumPy arrays and tuples only. Costs enter as integer ticks, so that no result depends on the order of
additions. The machine code is cached beside the source (or under NUMBA_CACHE_DIR), so that only the first process compiles.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

COMPILED = os.environ.get("EVERMESH_PLANNER", "compiled") != "python"
"""Whether the loops are compiled; set EVERMESH_PLANNER to ``python`` before the first import to leave them to Python."""


def compiled(function: F) -> F:
    """``function``, compiled when first called; it does not hold the interpreter's lock while it runs."""
    if not COMPILED:
        return function
    return numba.njit(cache=True, nogil=True)(function)  # type: ignore[return-value]

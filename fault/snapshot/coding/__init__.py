"""Erasure codes over buffers: XOR, P + Q and Cauchy, by ISA-L or by NumPy, bit for bit the same."""

from evermesh.fault.snapshot.coding.choice import EngineChoice, choose_engine
from evermesh.fault.snapshot.coding.code import Code
from evermesh.fault.snapshot.coding.coder import Coder, staggered_buffers
from evermesh.fault.snapshot.coding.errors import CodeImpossible, EngineUnusable, TooManyErasures

__all__ = [
    "Code",
    "CodeImpossible",
    "Coder",
    "EngineChoice",
    "EngineUnusable",
    "TooManyErasures",
    "choose_engine",
    "staggered_buffers",
]

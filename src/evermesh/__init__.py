"""Evermesh: a distributed training runtime and launcher for large language models.

A script that trains a model of its own needs three names, imported with torch when they are first used::

    mesh = evermesh.start(layout)
    model = evermesh.parallelize(AutoModelForCausalLM.from_config(config), layout, mesh)
    loss = model.train_batch(documents)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermesh.parallelism.layout import Layout
    from evermesh.runtime.own_model.joining import start
    from evermesh.runtime.own_model.module import ParallelModule, parallelize
    from evermesh.runtime.process_group import stop

__version__ = "0.1.0"
__all__ = ["Layout", "ParallelModule", "parallelize", "start", "stop"]

_MODULES = {
    "Layout": "parallelism.layout",
    "ParallelModule": "runtime.own_model.module",
    "parallelize": "runtime.own_model.module",
    "start": "runtime.own_model.joining",
    "stop": "runtime.process_group",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

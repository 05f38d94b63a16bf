"""Checkpoints of Megatron Core in its format ``torch_dist``: those of torch.distributed, and what all ranks share.

Tensors have the keys of their ``ShardedTensor``; what factories made of one (SwiGLU halves, experts) was put together when
it was saved. Sharded objects have their keys, ``KEY/shard_INDEX_COUNT``. What all ranks share is the object ``common``:
arguments, iteration, settings of the optimizer, as ``common.pt`` has it. Imports no torch.
"""

import json
from dataclasses import replace
from typing import Any

from evermesh.checkpoint.errors import DAMAGE, ForeignUnusable
from evermesh.checkpoint.foreign.fragments import whole
from evermesh.checkpoint.foreign.pickle_machine import Class
from evermesh.checkpoint.foreign.torch_distributed import open_torch_distributed
from evermesh.checkpoint.foreign.torch_files import Part, read_torch_file
from evermesh.checkpoint.foreign.values import Values
from evermesh.checkpoint.sources import Source, plain_files
from evermesh.checkpoint.stores.looking import is_file
from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.stores.store import store_of

COMMON, COMPLETE = "common.pt", "metadata.json"
_AGAIN = "A save may have been interrupted: load an earlier checkpoint, or copy this one again."
_BACKEND = "torch_dist"


def is_megatron(path: Place) -> bool:
    """Whether a folder is of this format, complete or not."""
    return is_file(path / COMMON) or is_file(path / COMPLETE)


def open_megatron(path: Place) -> Source:
    """Index the checkpoint in a folder ``iter_0000010``.

    Raises:
        ForeignUnusable: it is not complete, of another backend, or damaged.
    """
    backend = _backend(path / COMPLETE)
    if backend != _BACKEND:
        fact = f"its backend is {str(backend)[:40]!r}"
        raise ForeignUnusable(path, fact, f"Load it with Megatron Core and save it as {_BACKEND}.")
    source, values = open_torch_distributed(path), Values(path)
    objects, tensors = dict(source.objects), dict(source.tensors)
    step = None
    if is_file(path / COMMON):
        common = read_torch_file(Part(path / COMMON), {"argparse.Namespace": Class("Namespace")}, refuse_unknown=False)
        if not isinstance(common, dict):
            raise ForeignUnusable(path / COMMON, "it has no keys", _AGAIN)
        objects["common"] = values.json(common, "common")
        step = common.get("iteration")
        tensors |= {place: whole(path, place, tensor) for place, tensor in values.tensors.items()}
    return replace(
        source,
        kind="megatron",
        tensors=tensors,
        files=dict(source.files) | plain_files(path, {n: t for n, t in tensors.items() if n not in source.tensors}),
        objects=objects,
        description=dict(source.description) | {"library": "megatron-core"},
        step=step if type(step) is int else None,
        left_out=(*source.left_out, *values.left_out),
    )


def _backend(file: Place) -> Any:
    """What the last file of a save says."""
    try:
        return json.loads(store_of(file).read(file))["sharded_backend"]
    except FileNotFoundError as error:
        raise ForeignUnusable(file.parent, f"it has no {COMPLETE}, which is written last", _AGAIN) from error
    except (OSError, *DAMAGE) as error:
        raise ForeignUnusable(file, f"it names no backend ({type(error).__name__})", _AGAIN) from error

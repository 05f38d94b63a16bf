"""Checkpoints of torch.distributed in the safetensors form, before they are consolidated. Imports no torch.

Every rank has files ``shard-RANK-model-N-of-M.safetensors``, in which a tensor is one chunk, and notes where it belongs.
The shape of a tensor is how far its chunks reach: a file that is missing at the end makes it smaller, which nothing in the
others tells. Consolidated ones are Hugging Face directories. Format: as torch 2.13 writes it.
"""

import json
from fnmatch import fnmatchcase
from typing import Any

from evermesh.checkpoint.errors import DAMAGE, ForeignUnusable
from evermesh.checkpoint.format import Extent, StoredTensor
from evermesh.checkpoint.regions import Box
from evermesh.checkpoint.safetensors_files import FileTensor, read_notes
from evermesh.checkpoint.sources import Source, plain_files
from evermesh.checkpoint.stores.looking import files_in
from evermesh.checkpoint.stores.places import Place

PATTERN = "shard-*-model-*-of-*.safetensors"
_NOTE = "DCP_SHARDING_INFO"
_AGAIN = "A save may have been interrupted: load an earlier checkpoint, or copy this one again."


def open_sharded_safetensors(path: Place) -> Source:
    """Index the files of all ranks. Raises ``ForeignUnusable``: one is damaged, or chunks leave a gap or overlap."""
    chunks: dict[str, list[tuple[FileTensor, Box]]] = {}
    for file in files_in(path):
        if not fnmatchcase(file.name, PATTERN):
            continue
        found, notes = read_notes(file)
        try:
            places: Any = json.loads(notes[_NOTE])
            for name, tensor in found.items():
                offsets = places[name]["saved_offsets"]
                if any(type(offset) is not int for offset in offsets):
                    raise TypeError(f"offsets {offsets}")
                chunks.setdefault(name, []).append((tensor, Box(tuple(offsets), tensor.shape)))
        except DAMAGE as error:
            fact = f"it does not say where its tensors belong ({type(error).__name__}: {str(error)[:100]})"
            raise ForeignUnusable(file, fact, _AGAIN) from error
    tensors = {name: _assembled(path, name, of_tensor) for name, of_tensor in chunks.items()}
    return Source(path, "torch-distributed", tensors, plain_files(path, tensors), description={"library": "torch"})


def _assembled(path: Place, name: str, chunks: list[tuple[FileTensor, Box]]) -> StoredTensor:
    dtypes = sorted({tensor.dtype for tensor, _ in chunks})
    if len(dtypes) != 1:
        raise ForeignUnusable(path, f"the tensor {name} is stored as {' and '.join(dtypes)}", _AGAIN)
    ends = [tuple(o + s for o, s in zip(box.offsets, box.sizes, strict=True)) for _, box in chunks]
    extents = tuple(Extent(t.file.name, t.offset, box, 0, box.num_elements) for t, box in chunks)
    try:
        stored = StoredTensor(dtypes[0], tuple(map(max, zip(*ends, strict=True))), extents)
        stored.check_cover(name)
    except DAMAGE as error:
        raise ForeignUnusable(path, f"its files do not fit together: {error}", _AGAIN) from error
    return stored

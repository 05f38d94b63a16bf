"""Opening a checkpoint of any format that this version knows. Imports no torch."""

from fnmatch import fnmatchcase
from pathlib import PurePath

from evermesh.checkpoint.directory import instead_of, read_manifest
from evermesh.checkpoint.errors import CheckpointNotFound, ForeignUnusable
from evermesh.checkpoint.format import MANIFEST
from evermesh.checkpoint.huggingface import INDEX, SINGLE, open_safetensors
from evermesh.checkpoint.indexed import Indexes, source_of
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.attempts import folder_of
from evermesh.checkpoint.stores.looking import files_in, is_file, is_folder
from evermesh.checkpoint.stores.places import Place, place_of
from evermesh.checkpoint.stores.store import store_of

_POINTERS = {"latest": "{}", "latest_universal": "{}", "latest_checkpointed_iteration.txt": "iter_{:0>7}"}
"""Files in which DeepSpeed and Megatron name a folder beside them, and how this is called."""


def open_checkpoint(path: Place | str) -> Source:
    """Index the checkpoint at ``path``; no tensor is read and nothing is executed. Not collective.

    A folder of DeepSpeed with a file ``latest`` stands for the tag that this names.

    Raises:
        CheckpointNotFound: there is none of a known format.
        CheckpointCorrupt, ForeignUnusable: there is one that cannot be read.
        StoreUnusable: it is in an object store that does not answer.
    """
    path = place_of(path)
    folder = folder_of(path)
    if is_file(folder / MANIFEST):
        return source_of(Indexes(folder, read_manifest(path)))
    names = {file.name for file in files_in(path)}
    if not names.isdisjoint((INDEX, SINGLE)):
        return open_safetensors(path)
    if not names.isdisjoint((".metadata", "__0.metadata")):
        from evermesh.checkpoint.foreign.megatron import is_megatron, open_megatron
        from evermesh.checkpoint.foreign.torch_distributed import open_torch_distributed

        return open_megatron(path) if is_megatron(path) else open_torch_distributed(path)
    if any(fnmatchcase(name, "shard-*-model-*.safetensors") for name in names):
        from evermesh.checkpoint.foreign.sharded_safetensors import open_sharded_safetensors

        return open_sharded_safetensors(path)
    if is_folder(path / "zero"):
        from evermesh.checkpoint.foreign.deepspeed_universal import open_universal

        return open_universal(path)
    if any(name.endswith("_states.pt") for name in names):
        from evermesh.checkpoint.foreign.deepspeed import open_deepspeed

        return open_deepspeed(path)
    named = _named(path)
    if named is not None:
        return open_checkpoint(named)
    raise CheckpointNotFound(
        path,
        f"it has no {MANIFEST}, and is no checkpoint of DeepSpeed, of torch.distributed, or of safetensors files"
        f"{instead_of(path)}",
    )


def _named(path: Place) -> Place | None:
    """The folder that a pointer in ``path`` names."""
    for pointer, folder in _POINTERS.items():
        file = path / pointer
        if not is_file(file):
            continue
        try:
            name = folder.format(store_of(file).read(file).decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise ForeignUnusable(file, "it is no text", "Name the folder of a tag.") from error
        if not name or PurePath(name).name != name:
            raise ForeignUnusable(file, f"it names {name[:100]!r}, no folder beside it", "Name the folder of a tag.")
        if is_folder(path / name):
            return path / name
    return None

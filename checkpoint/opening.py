"""Opening a checkpoint of any format that this version knows. Imports no torch."""

from pathlib import Path

from evermesh.checkpoint.directory import instead_of, read_manifest
from evermesh.checkpoint.errors import CheckpointNotFound, ForeignUnusable
from evermesh.checkpoint.format import MANIFEST
from evermesh.checkpoint.huggingface import INDEX, SINGLE, open_safetensors
from evermesh.checkpoint.indexed import Indexes, source_of
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.attempts import folder_of
from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of

_POINTERS = {"latest": "{}", "latest_universal": "{}", "latest_checkpointed_iteration.txt": "iter_{:0>7}"}
"""Files in which DeepSpeed and Megatron name a folder beside them, and how this is called."""


def open_checkpoint(path: Place | str) -> Source:
    """Index the checkpoint at ``path``; no tensor is read and nothing is executed. Not collective.

    A folder of DeepSpeed with a file ``latest`` stands for the tag that this names. In an object store, checkpoints of our
    own format are read, those of other projects are not.

    Raises:
        CheckpointNotFound: there is none of a known format.
        CheckpointCorrupt, ForeignUnusable: there is one that cannot be read.
        StoreUnusable: it is in an object store that does not answer.
    """
    path = place_of(path)
    folder = folder_of(path)
    if isinstance(path, ObjectPath) or isinstance(folder, ObjectPath):
        return _open_in_store(path)
    if (folder / MANIFEST).is_file():
        return source_of(Indexes(folder, read_manifest(folder)))
    if (path / INDEX).is_file() or (path / SINGLE).is_file():
        return open_safetensors(path)
    if (path / ".metadata").is_file() or (path / "__0.metadata").is_file():
        from evermesh.checkpoint.foreign.megatron import is_megatron, open_megatron
        from evermesh.checkpoint.foreign.torch_distributed import open_torch_distributed

        return open_megatron(path) if is_megatron(path) else open_torch_distributed(path)
    if any(path.glob("shard-*-model-*.safetensors")):
        from evermesh.checkpoint.foreign.sharded_safetensors import open_sharded_safetensors

        return open_sharded_safetensors(path)
    if (path / "zero").is_dir():
        from evermesh.checkpoint.foreign.deepspeed_universal import open_universal

        return open_universal(path)
    if path.is_dir() and any(path.glob("*_states.pt")):
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


def _open_in_store(path: Place) -> Source:
    try:
        manifest = read_manifest(path)
    except CheckpointNotFound as error:
        fact = f"{error.fact}. One of another project is read from a file system only: copy it to one"
        raise CheckpointNotFound(path, fact) from error
    return source_of(Indexes(folder_of(path), manifest))


def _named(path: Path) -> Path | None:
    """The folder that a pointer in ``path`` names."""
    for pointer, folder in _POINTERS.items():
        file = path / pointer
        if not file.is_file():
            continue
        try:
            name = folder.format(file.read_text("utf-8").strip())
        except UnicodeDecodeError as error:
            raise ForeignUnusable(file, "it is no text", "Name the folder of a tag.") from error
        if not name or Path(name).name != name:
            raise ForeignUnusable(file, f"it names {name[:100]!r}, no folder beside it", "Name the folder of a tag.")
        if (path / name).is_dir():
            return path / name
    return None

"""Weights in directories as Hugging Face keeps them: ``model.safetensors``, or several files and their index.

Which tensor is which is given as data (``Naming``); this room knows no model. Only safetensors is read: the other formats
of such directories are pickles, which may execute anything.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from evermesh.checkpoint.errors import DAMAGE, WeightsUnusable
from evermesh.checkpoint.format import Extent, StoredTensor
from evermesh.checkpoint.naming import Naming
from evermesh.checkpoint.regions import Box
from evermesh.checkpoint.safetensors_files import FileTensor, read_header
from evermesh.checkpoint.sources import Source, find, plain_files
from evermesh.checkpoint.stores.looking import files_in, is_file, is_folder
from evermesh.checkpoint.stores.places import Place, place_of
from evermesh.checkpoint.stores.store import store_of

if TYPE_CHECKING:
    from evermesh.checkpoint.filling import Target

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATING = ("float64", "float32", "float16", "bfloat16")
_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class WeightsRead:
    """What one call of ``read_weights`` did."""

    bytes_read: int
    """Bytes of tensors; the headers of the files are not counted."""
    dtypes: tuple[str, ...]
    """In which the weights are stored; they were converted to those of the tensors they were read into."""


def read_weights(directory: Place | str, naming: Naming, wanted: Mapping[str, "Sequence[Target]"]) -> WeightsRead:
    """Fill the wanted regions of our tensors from a Hugging Face directory, reading the bytes of these regions only.

    Not collective. Regions are in the logical form of their tensor. Where the stored type differs from that of a
    tensor the values are converted: to a wider floating type exactly, to a narrower one rounded to the nearest. Extra
    memory is about 256 MiB, or one region.

    Raises:
        WeightsUnusable: there are no safetensors files, or tensors are missing, unknown, or of another shape or a type
            that is not floating; nothing was read then. Or a file is truncated.
    """
    from evermesh.checkpoint.filling import fill

    source = open_safetensors(place_of(directory))
    _check(source.path, source.tensors, naming)
    found, _ = find(source, naming)
    dtypes = {found[name].dtype for name in wanted}
    return WeightsRead(fill(source, found, wanted, {}), tuple(sorted(dtypes)))


def open_safetensors(directory: Place) -> Source:
    """Index the safetensors files of a directory; see ``tensors_in`` for what it raises."""
    tensors = {}
    for name, place in tensors_in(directory).items():
        whole = Box((0,) * len(place.shape), place.shape)
        extent = Extent(place.file.name, place.offset, whole, 0, whole.num_elements)
        tensors[name] = StoredTensor(place.dtype, place.shape, (extent,))
    return Source(directory, "safetensors", tensors, plain_files(directory, tensors))


def tensors_in(directory: Place) -> dict[str, FileTensor]:
    """All tensors of a directory, by their names, from the headers of its files.

    Raises:
        WeightsUnusable: there are no safetensors files, one is missing or damaged, or the index says otherwise.
    """
    index = directory / INDEX
    if not is_file(index):
        if not is_file(directory / SINGLE):
            raise _no_safetensors(directory)
        return read_header(directory / SINGLE)
    try:
        places: dict[str, str] = json.loads(store_of(index).read(index))["weight_map"]
        files = sorted(set(places.values()))
        if not all(isinstance(file, str) for file in files):
            raise TypeError("a name of a file is no text")
    except DAMAGE as error:
        raise WeightsUnusable(index, f"it holds no weight_map: {repr(error)[:200]}", "Fetch the file again.") from error
    outside = [file for file in files if PurePath(file).name != file or "\0" in file]
    if outside:
        raise WeightsUnusable(index, f"it names {outside[0]!r}, which is not in its directory", "Fetch the file again.")
    found = {file: read_header(directory / file) for file in files}
    lacking = [name for name, file in places.items() if name not in found[file]]
    if lacking:
        raise WeightsUnusable(index, f"{lacking[0]} is not in {places[lacking[0]]}", "Fetch both files again.")
    return {name: found[file][name] for name, file in places.items()}


def _no_safetensors(directory: Place) -> WeightsUnusable:
    if not is_folder(directory):
        return WeightsUnusable(directory, "there is no such directory", "Name a Hugging Face model directory.")
    pickles = sorted(file.name for file in files_in(directory) if file.name.endswith((".bin", ".pt", ".pth")))
    if pickles:
        return WeightsUnusable(
            directory,
            f"its weights are pickles ({', '.join(pickles[:3])}), which may execute anything when they are read",
            "Fetch its safetensors files, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY) of transformers.",
        )
    return WeightsUnusable(directory, f"it has neither {SINGLE} nor {INDEX}", "Name a Hugging Face model directory.")


def _check(directory: Place, stored: Mapping[str, StoredTensor], naming: Naming) -> None:
    missing = naming.foreign_shapes.keys() - stored.keys()
    extra = [name for name in stored.keys() - naming.foreign_shapes.keys() if not naming.is_unread(name)]
    problems = [f"{name} {list(naming.foreign_shapes[name])} is missing" for name in sorted(missing)]
    problems += [f"{name} {list(stored[name].shape)} is no part of the model" for name in sorted(extra)]
    for name, shape in naming.foreign_shapes.items():
        if name in stored and stored[name].shape != shape:
            problems.append(f"{name} is {list(stored[name].shape)}, the model has {list(shape)}")
        elif name in stored and stored[name].dtype not in _FLOATING:
            problems.append(f"{name} is of type {stored[name].dtype}, which is not one of {', '.join(_FLOATING)}")
    for name, parts in naming.parts.items():
        types = sorted({stored[part.name].dtype for part in parts if part.name in stored})
        if len(types) > 1:
            problems.append(f"what makes up {name} is of types {' and '.join(types)}")
    if problems:
        more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise WeightsUnusable(
            directory,
            f"its tensors are not those of the model: {'; '.join(problems[:_MOST_NAMED])}{more}",
            "Use the config.json that belongs to them.",
        )

"""Weights in directories as Hugging Face keeps them: ``model.safetensors``, or several files and their index.

Which tensor is which is given as data (``Naming``); this room knows no model. Only safetensors is read: the other formats
of such directories are pickles, which may execute anything.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import WeightsUnusable
from evermesh.checkpoint.files import ByteArray
from evermesh.checkpoint.loading import Target
from evermesh.checkpoint.naming import Naming
from evermesh.checkpoint.regions import IntArray, StoredForm, intersect
from evermesh.checkpoint.safetensors_files import FileTensor, read_header
from evermesh.checkpoint.tensors import byte_view

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


def read_weights(directory: Path | str, naming: Naming, wanted: Mapping[str, Sequence[Target]]) -> WeightsRead:
    """Fill the wanted regions of our tensors from a Hugging Face directory, reading the bytes of these regions only.

    Not collective. Regions are in the logical form of their tensor. Where the stored type differs from that of a
    tensor the values are converted: to a wider floating type exactly, to a narrower one rounded to the nearest. Extra
    memory is one region.

    Raises:
        WeightsUnusable: there are no safetensors files, or tensors are missing, unknown, or of another shape or a type
            that is not floating; nothing was read then. Or a file is truncated.
    """
    directory = Path(directory)
    stored = tensors_in(directory)
    _check(directory, stored, naming)
    bytes_read, dtypes = 0, set[str]()
    with _Files() as files:
        for name, targets in wanted.items():
            dtypes |= {stored[part.name].dtype for part in naming.parts[name]}
            for target in targets:
                bytes_read += _fill(name, target, naming, stored, files)
    return WeightsRead(bytes_read, tuple(sorted(dtypes)))


def tensors_in(directory: Path) -> dict[str, FileTensor]:
    """All tensors of a directory, by their names, from the headers of its files.

    Raises:
        WeightsUnusable: there are no safetensors files, one is missing or damaged, or the index says otherwise.
    """
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise _no_safetensors(directory)
        return read_header(directory / SINGLE)
    try:
        places: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsUnusable(index, f"it holds no weight_map: {error!r}", "Fetch the file again.") from error
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise WeightsUnusable(index, f"it names {outside[0]!r}, which is not in its directory", "Fetch the file again.")
    found = {file: read_header(directory / file) for file in files}
    lacking = [name for name, file in places.items() if name not in found[file]]
    if lacking:
        raise WeightsUnusable(index, f"{lacking[0]} is not in {places[lacking[0]]}", "Fetch both files again.")
    return {name: found[file][name] for name, file in places.items()}


def _no_safetensors(directory: Path) -> WeightsUnusable:
    if not directory.is_dir():
        return WeightsUnusable(directory, "there is no such directory", "Name a Hugging Face model directory.")
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickles:
        return WeightsUnusable(
            directory,
            f"its weights are pickles ({', '.join(pickles[:3])}), which may execute anything when they are read",
            "Fetch its safetensors files, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY) of transformers.",
        )
    return WeightsUnusable(directory, f"it has neither {SINGLE} nor {INDEX}", "Name a Hugging Face model directory.")


def _check(directory: Path, stored: Mapping[str, FileTensor], naming: Naming) -> None:
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


def _fill(name: str, target: Target, naming: Naming, stored: Mapping[str, FileTensor], files: "_Files") -> int:
    """Fill one region; returns the bytes read."""
    region, tensor = target
    form, parts = StoredForm(naming.shapes[name]), naming.parts[name]
    dtype = stored[parts[0].name].dtype
    item = DTYPES[dtype].num_bytes
    host = torch.empty(region.num_elements, dtype=getattr(torch, dtype))
    num_read = 0
    for part in parts:
        shared = intersect(part.box, form, region, form)
        place = stored[part.name]
        positions = place.offset + (part.start + shared.source) * item
        files.read(place.file, positions, shared.destination * item, shared.length * item, byte_view(host))
        num_read += shared.num_elements
    assert num_read == region.num_elements, f"the parts of {name} do not add up although they cover it"
    with torch.no_grad():
        tensor.copy_(host.view(tensor.shape))
    return num_read * item


class _Files:
    """Open files of a directory. A context manager."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, file: Path, positions: IntArray, offsets: IntArray, lengths: IntArray, buffer: ByteArray) -> None:
        """Read stretches, each given as position in the file, position in ``buffer`` and length, in bytes."""
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        view = buffer.data
        for position, offset, length in zip(positions.tolist(), offsets.tolist(), lengths.tolist(), strict=True):
            filled = 0
            while filled < length:
                rest = view[offset + filled : offset + length]
                num_bytes = os.preadv(self._descriptors[file], [rest], position + filled)
                if not num_bytes:
                    raise WeightsUnusable(file, f"it ends at byte {position + filled:,}", "Fetch the file again.")
                filled += num_bytes

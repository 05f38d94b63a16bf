"""Writes directories of safetensors files of limited size and their index, as Hugging Face keeps them."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from evermesh.checkpoint.contents import Content, Stream, Tell
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.encoding import HeaderEntry, safetensors_head
from evermesh.checkpoint.files import sync_directory, write_checksummed, write_durably
from evermesh.checkpoint.huggingface import INDEX, SINGLE
from evermesh.checkpoint.sources import Source

MOST_FILE_BYTES = 5_000_000_000
"""As transformers writes them."""
_METADATA = {"format": "pt"}
"""Readers ask for it: elements are laid out as torch does."""


@dataclass(frozen=True, slots=True)
class WeightsWritten:
    """What was written."""

    files: tuple[str, ...]
    num_bytes: int
    """Of all tensors."""


def write_safetensors(
    directory: Path,
    source: Source,
    contents: Mapping[str, Content],
    *,
    metadata: Mapping[str, str] | None = None,
    most_file_bytes: int = MOST_FILE_BYTES,
    tell: Tell | None = None,
) -> WeightsWritten:
    """Write tensors by their names into ``directory``, which exists and holds none yet. Not collective.

    Every chunk of ``source`` that is read is verified where it has checksums. Memory is bounded as that of a ``Stream``.
    Returns when all bytes are on the disk.

    Raises:
        ForeignUnusable, CheckpointCorrupt: the tensors cannot be read, or not be converted.
    """
    files = _names(in_file_order(contents), most_file_bytes)
    stream = Stream(source, [contents[name] for of_file in files.values() for name in of_file], tell)
    for file, of_file in files.items():
        entries = entries_of({name: contents[name] for name in of_file})
        head = safetensors_head(entries, _METADATA | dict(metadata or {}))
        payloads = itertools.chain.from_iterable(stream.take(contents[name]) for name in of_file)
        write_checksummed(directory / file, itertools.chain([head], payloads))
    num_bytes = sum(content.num_bytes for content in contents.values())
    if len(files) > 1:
        weight_map = {name: file for file, of_file in files.items() for name in of_file}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_durably(directory / INDEX, [json.dumps(index, indent=2).encode()])
    sync_directory(directory)
    return WeightsWritten(tuple(files), num_bytes)


def in_file_order(contents: Mapping[str, Content]) -> dict[str, Content]:
    """Larger elements first: every tensor is then aligned to its own element size."""
    return dict(sorted(contents.items(), key=lambda entry: -DTYPES[entry[1].dtype].num_bytes))


def entries_of(contents: Mapping[str, Content]) -> list[HeaderEntry]:
    """What the head of a file says about tensors that follow in this order."""
    return [
        HeaderEntry(name, DTYPES[content.dtype].code, content.shape, content.num_bytes)
        for name, content in contents.items()
    ]


def _names(contents: Mapping[str, Content], most_file_bytes: int) -> dict[str, list[str]]:
    """Which file holds which tensors: filled one after the other; a tensor larger than a file has its own."""
    files = list(_filled(contents, most_file_bytes))
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, start=1)}


def _filled(contents: Mapping[str, Content], most_file_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    free = most_file_bytes
    for name, content in contents.items():
        if content.num_bytes > free and names:
            yield names
            names, free = [], most_file_bytes
        names.append(name)
        free -= content.num_bytes
    yield names

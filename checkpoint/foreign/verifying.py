"""Verifying checkpoints of other projects: their structure, their sizes, and the checksums where there are any.

Files of ``torch.save`` are zip archives, whose entries have a CRC-32; torch writes it and never looks at it again. It is
compared here for DeepSpeed and torch.distributed. Files in the safetensors format have no checksum: that they can be read
whole is all that can be told.
"""

from collections.abc import Iterator

from evermesh.checkpoint.contents import Stream, whole
from evermesh.checkpoint.errors import CheckpointCorrupt, ForeignUnusable, ShardMapInvalid
from evermesh.checkpoint.foreign.torch_distributed import archives
from evermesh.checkpoint.foreign.torch_files import Part, check_torch_file
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.looking import files_below, name_below
from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.verifying import Problem, VerifyReport


def verify_foreign(path: Place) -> VerifyReport:
    """Check a checkpoint of another project; reads all of it once.

    Raises:
        CheckpointNotFound: there is none at ``path``.
    """
    try:
        source = open_checkpoint(path)
    except ForeignUnusable as error:
        return VerifyReport(path, (Problem("format", name_below(path, error.path), error.fact),), 0, 0)
    problems = list(_structure(source))
    parts = list(_archives(source))
    if not parts:
        found, num_bytes = _read(source)
        return VerifyReport(source.path, (*problems, *found), len(source.files), num_bytes, has_checksums=False)
    num_bytes = 0
    for part in parts:
        try:
            num_bytes += check_torch_file(part)
        except ForeignUnusable as error:
            problems.append(Problem("checksum", name_below(source.path, part.file), _held(source, part) + error.fact))
    return VerifyReport(source.path, tuple(problems), len({part.file for part in parts}), num_bytes)


def _archives(source: Source) -> Iterator[Part]:
    """The files of ``torch.save`` of a checkpoint."""
    if source.kind == "torch-distributed":
        yield from archives(source)
    elif source.kind in ("deepspeed", "deepspeed-universal"):
        yield from (Part(file) for file in files_below(source.path) if file.name.endswith(".pt"))


def _structure(source: Source) -> Iterator[Problem]:
    """Whether every tensor is covered once, by bytes that are inside their files."""
    for name, tensor in source.tensors.items():
        try:
            tensor.check_cover(name)
            for extent in tensor.extents:
                end = source.locate(extent) + tensor.num_bytes(extent)
                if end > source.files[extent.file].num_bytes:
                    fact = f"{name} ends at byte {end:,} of {source.files[extent.file].num_bytes:,}"
                    yield Problem("size", extent.file, fact)
        except ShardMapInvalid as error:
            yield Problem("coverage", "", str(error))
        except ForeignUnusable as error:
            yield Problem("format", name_below(source.path, error.path), f"{name}: {error.fact}")


def _read(source: Source) -> tuple[list[Problem], int]:
    """Read every tensor once; what could not be read, and the bytes that could."""
    problems, num_bytes = [], 0
    for name in source.tensors:
        content = whole(source, name)
        try:
            for view in Stream(source, [content]).take(content):
                num_bytes += view.nbytes
        except CheckpointCorrupt as error:
            problems.append(Problem("size", name_below(source.path, error.file), f"{name}: {error.fact}"))
    return problems, num_bytes


def _held(source: Source, part: Part) -> str:
    """Names of tensors that are in a damaged archive, if it is one of a few."""
    file, stop = name_below(source.path, part.file), part.start + (part.num_bytes or 0)
    names = source.tensors_in(file, part.start, stop) if part.num_bytes else []
    return f"{', '.join(names[:3])}: " if names else ""

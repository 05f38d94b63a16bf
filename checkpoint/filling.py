"""Filling tensors from a source: one path for every format and every layout."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from evermesh.checkpoint.coverage import check_cover
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import CheckpointCorrupt, ShardMapInvalid
from evermesh.checkpoint.format import Extent, StoredTensor
from evermesh.checkpoint.reading import read_files
from evermesh.checkpoint.regions import Interval, Region, Runs, StoredForm, intersect, join, logical_runs
from evermesh.checkpoint.scattering import FileRuns
from evermesh.checkpoint.sources import Found, Source
from evermesh.checkpoint.tensors import byte_view, dtype_name

Target = tuple[Region, torch.Tensor]
"""A region, and the tensor whose row-major elements it is to fill."""
Known = dict[tuple[Region, int, int, StoredForm, Region, StoredForm], Runs]
"""What of a part of a stored region lies in another one: region, start, stop and form, then region and form."""
MOST_STAGED_BYTES = 256 << 20
"""Of copies that exist at a time because values are converted or tensors are elsewhere; one region may exceed it."""


def fill(
    source: Source,
    found: Mapping[str, Found],
    targets: Mapping[str, Sequence[Target]],
    forms: Mapping[str, StoredForm],
) -> int:
    """Fill all targets, which fit; returns the bytes read from files of tensors.

    Regions are in the form that ``forms`` gives, or else in the logical one; elements of a target that are padding stay
    as they are. Values whose stored type is another are converted, rounded to the nearest. Nothing is read before it is
    proven that the source holds all of it.

    Raises:
        CheckpointCorrupt: extents leave a gap, a file is missing or not as it was saved, or a checksum is wrong.
    """
    bytes_read = 0
    for filling in fillings(source, found, targets, forms):
        bytes_read += read_files(source, filling.runs())
        filling.finish()
    return bytes_read


def fillings(
    source: Source,
    found: Mapping[str, Found],
    targets: Mapping[str, Sequence[Target]],
    forms: Mapping[str, StoredForm],
) -> "Iterator[Filling]":
    """What ``fill`` does, part after part; a checkpoint of ours is one part."""
    known: Known = {}
    plans = [
        _Plan(source, found[name], forms.get(name, StoredForm(found[name].shape)), target, known)
        for name, of_tensor in targets.items()
        for target in of_tensor
    ]
    return map(Filling, _groups(plans, one=not source.is_foreign))


class Filling:
    """Targets that are filled at a time."""

    def __init__(self, plans: "Sequence[_Plan]") -> None:
        self._plans = plans

    def runs(self) -> dict[str, list[FileRuns]]:
        """Provide what bytes are read into; what has to be read of every file."""
        runs: dict[str, list[FileRuns]] = {}
        for plan in self._plans:
            plan.stage()
            for file, entry in plan.file_runs():
                runs.setdefault(file, []).append(entry)
        return runs

    def finish(self) -> None:
        """Move what was read to where it is wanted."""
        for plan in self._plans:
            plan.finish()


class _Plan:
    """What fills one target."""

    def __init__(self, source: Source, found: Found, form: StoredForm, target: Target, known: "Known") -> None:
        self.found, self.form = found, form
        self.region, self.tensor = target
        self.pieces = list(pieces(source, found, form, self.region, known))
        self.source = source
        is_plain = form.padding is None
        wanted = self.region.num_elements if is_plain else logical_runs(self.region, form).num_elements
        if sum(runs.num_elements for _, _, runs in self.pieces) != wanted:
            _refuse_cover(source, found)

    @property
    def is_converted(self) -> bool:
        return dtype_name(self.tensor) != self.found.dtype

    @property
    def staged_bytes(self) -> int:
        """Of the copy that it needs."""
        in_place = not self.is_converted and self.tensor.device.type == "cpu" and self.tensor.is_contiguous()
        return 0 if in_place else self.region.num_elements * DTYPES[self.found.dtype].num_bytes

    def stage(self) -> None:
        """Provide what the bytes are read into."""
        self.host = self.tensor.detach()
        if self.is_converted:
            self.host = torch.empty(self.region.num_elements, dtype=getattr(torch, self.found.dtype))
        elif self.staged_bytes:
            # a copy, not an empty tensor: padding stays as it is
            self.host = self.host.cpu().clone(memory_format=torch.contiguous_format)

    def file_runs(self) -> Iterator[tuple[str, FileRuns]]:
        """What is read, by file."""
        item, destination = DTYPES[self.found.dtype].num_bytes, byte_view(self.host)
        for stored, extent, runs in self.pieces:
            begin = self.source.locate(extent)
            assert stored.dtype == self.found.dtype
            yield (
                extent.file,
                FileRuns(begin + runs.source * item, runs.destination * item, runs.length * item, destination, item),
            )

    @torch.no_grad()
    def finish(self) -> None:
        """Move what was read to where it is wanted."""
        if self.is_converted and self.form.padding is not None:
            is_read = np.zeros(self.region.num_elements, bool)
            runs = logical_runs(self.region, self.form)
            for offset, length in zip(runs.destination.tolist(), runs.length.tolist(), strict=True):
                is_read[offset : offset + length] = True
            before = self.tensor.detach().flatten()
            self.host = torch.where(torch.from_numpy(is_read).to(before.device), self.host.to(before), before)
        if self.host.data_ptr() != self.tensor.data_ptr():
            self.tensor.copy_(self.host.view(self.tensor.shape))
        del self.host


def pieces(
    source: Source, found: Found, form: StoredForm, region: Region, known: Known | None = None
) -> Iterator[tuple[StoredTensor, Extent, Runs]]:
    """By extent: the runs from the elements that are stored there to the storage of ``region``; what is ``known`` is not
    computed again, because layers and moments lie alike."""
    known = {} if known is None else known
    for part in found.parts:
        stored = source.tensors[part.name]
        if len(found.parts) == 1 and stored.shape == found.shape:
            for extent in stored.extents_near(region, form):
                key = (extent.region, extent.start, extent.stop, stored.form, region, form)
                if key not in known:
                    runs = intersect(extent.region, stored.form, region, form)
                    known[key] = runs.clip(extent.start, extent.stop)
                if len(known[key].length):
                    yield stored, extent, known[key]
            continue
        in_part = intersect(part.box, StoredForm(found.shape), region, form).shifted(part.start)
        if not len(in_part.length):
            continue
        span = Interval(int(in_part.source[0]), int(in_part.source[-1] + in_part.length[-1]))
        for extent in stored.extents_near(span, StoredForm(stored.shape)):
            runs = join(logical_runs(extent.region, stored.form), in_part).clip(extent.start, extent.stop)
            if len(runs.length):
                yield stored, extent, runs


def _groups(plans: Sequence[_Plan], *, one: bool) -> Iterator[list[_Plan]]:
    """Plans whose copies fit together; all of them, also none, if chunks are read whole, which two groups would read
    twice."""
    if one:
        yield list(plans)
        return
    group: list[_Plan] = []
    staged = 0
    for plan in plans:
        if group and staged + plan.staged_bytes > MOST_STAGED_BYTES:
            yield group
            group, staged = [], 0
        group.append(plan)
        staged += plan.staged_bytes
    if group:
        yield group


def _refuse_cover(source: Source, found: Found) -> None:
    for part in found.parts:
        stored = source.tensors[part.name]
        try:
            check_cover(stored.form, tuple((extent.region, extent.start, extent.stop) for extent in stored.extents))
        except ShardMapInvalid as error:
            raise CheckpointCorrupt(source.path, f"tensor {part.name}: {error}") from error
        if not isinstance(stored.extents, tuple):
            fact = f"tensor {part.name[:100]}: not the ranks that the manifest names wrote what it says they did"
            raise CheckpointCorrupt(source.path, fact)
    raise AssertionError(f"{found}: runs do not add up although its extents cover it")

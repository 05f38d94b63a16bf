"""Writes a checkpoint of any format that is read into any format that is written, streamed and all at once visible."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from evermesh.checkpoint.contents import Stream, Tell, whole
from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.files import write_durably
from evermesh.checkpoint.folders import appearing
from evermesh.checkpoint.foreign.deepspeed_native_writing import native_files
from evermesh.checkpoint.foreign.deepspeed_universal_writing import universal_files
from evermesh.checkpoint.foreign.deepspeed_writing import Model, check, is_at_top, kinds_of
from evermesh.checkpoint.foreign.torch_distributed_writing import write_torch_distributed
from evermesh.checkpoint.foreign.torch_writing import contents_of
from evermesh.checkpoint.foreign.training import Training, training_of
from evermesh.checkpoint.formats import Format
from evermesh.checkpoint.loading import FLOATING
from evermesh.checkpoint.rewriting import rewrite
from evermesh.checkpoint.safetensors_writing import MOST_FILE_BYTES, write_safetensors
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of
from evermesh.checkpoint.stores.store import store_of

_FILE_BYTES = 1 << 20
"""Of the buffer of a file that is written."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to write."""

    to: Format
    ranks: int = 1
    """For how many ranks native files of DeepSpeed are, and among how many the files of torch.distributed are divided."""
    dtype: str | None = None
    """Type of the weights that the model computes with; None: as the source says, or as they are stored."""
    step: int | None = None
    """None: as the source says."""
    groups: Sequence[Mapping[str, Any]] | None = None
    """Of the optimizer, if the source does not say; see ``training_of``."""
    most_file_bytes: int = MOST_FILE_BYTES
    """Of a safetensors file."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion wrote."""

    path: Place
    """What ``open_checkpoint`` opens."""
    num_files: int
    num_bytes: int
    """Of all files."""
    left_out: tuple[str, ...]
    """What the source holds and the target cannot, or what the source itself has left out."""


def convert(source: Source, directory: Place | str, conversion: Conversion, tell: Tell | None = None) -> Converted:
    """Write what is in ``source`` anew into ``directory``, in another format. Not collective; needs no process group.

    Memory is bounded, whatever the size of tensors. ``directory`` is new, and appears when all of it is on the disk; of
    our own format it is the directory of checkpoints, in which the step appears, in an object store perhaps. ``tell``
    hears of bytes as they are written.

    Raises:
        ForeignUnusable: the source lacks what the format needs, or ``directory`` is not empty or is no place for the format;
            nothing is left of it.
        CheckpointCorrupt: bytes of the source are not those that were saved.
        CheckpointNotSaved: our own format could not be written.
    """
    directory = place_of(directory)
    _check_options(directory, conversion)
    training = training_of(source, conversion.groups)
    left_out: tuple[str, ...] = ()
    if conversion.to == "evermesh":
        path = _to_ours(training, directory, conversion, tell)
    else:
        assert isinstance(directory, Path)
        with appearing(directory) as temporary:
            left_out = _write(training, temporary, conversion, tell)
        path = directory
    sizes = store_of(path).sizes(path)
    return Converted(path, len(sizes), sum(sizes.values()), (*source.left_out, *left_out))


def bytes_to_write(source: Source) -> int:
    """About how many bytes ``tell`` will hear of, for a progress bar: those of all tensors of the source."""
    return sum(tensor.num_bytes(extent) for tensor in source.tensors.values() for extent in tensor.extents)


def _check_options(directory: Place, conversion: Conversion) -> None:
    """Refuse a place that cannot be, and what would be ignored."""
    to = conversion.to
    if isinstance(directory, ObjectPath) and to != "evermesh":
        fact = f"{to} is written to file systems only"
        raise ForeignUnusable(directory, fact, "Write it to a directory and copy that, or convert to evermesh.")
    if conversion.ranks != 1 and to != "torch-distributed" and not to.startswith("deepspeed-zero"):
        fact = f"{to} for {conversion.ranks} ranks was asked for"
        raise ForeignUnusable(directory, fact, "Leave --ranks out: any number of ranks loads this format.")
    if conversion.dtype is not None and to in ("evermesh", "torch-distributed"):
        fact = f"{to} in {conversion.dtype} was asked for"
        raise ForeignUnusable(directory, fact, "Leave --dtype out: this format keeps every tensor as it is.")


def _write(training: Training, directory: Path, conversion: Conversion, tell: Tell | None) -> tuple[str, ...]:
    """Write a foreign format; returns what it leaves out."""
    if conversion.to == "safetensors":
        return _to_safetensors(training, directory, conversion, tell)
    if conversion.to == "torch-distributed":
        write_torch_distributed(directory, training, conversion.ranks, tell)
        return ()
    return _to_deepspeed(training, directory, conversion, tell)


def _to_safetensors(training: Training, directory: Path, conversion: Conversion, tell: Tell | None) -> tuple[str, ...]:
    """Weights and buffers, under their own names; a tied weight is there once, and its other names are metadata."""
    source, dtype = training.source, conversion.dtype
    if not training.parameters:
        fact = "none of its tensors is called as a weight of a training state"
        raise ForeignUnusable(source.path, fact, "Take them out with `evermesh checkpoint extract --tensor '*'`.")
    weights = {
        name: whole(source, tensor, dtype if source.tensors[tensor].dtype in FLOATING else None)
        for name, tensor in training.parameters.items()
    }
    buffers = {name: whole(source, tensor) for name, tensor in training.buffers.items()}
    write_safetensors(
        directory,
        source,
        weights | buffers,
        metadata=training.aliases,
        most_file_bytes=conversion.most_file_bytes,
        tell=tell,
    )
    kinds = [f"{kind}.* ({len(of_kind)} tensors)" for kind, of_kind in training.states.items()]
    objects = [f"object {name}" for name in source.objects if name != "aliases"]
    return (*kinds, *training.client.values(), *training.others, *objects)


def _to_deepspeed(training: Training, directory: Path, conversion: Conversion, tell: Tell | None) -> tuple[str, ...]:
    """A folder of a tag, and the file that names it."""
    check(training)
    model = Model(training, conversion.ranks, conversion.dtype or _dtype_of(training))
    step = _step_of(training, conversion)
    is_universal = conversion.to == "deepspeed-universal"
    tag, pointer = f"global_step{step}", "latest"
    if is_universal:
        tag, pointer = f"{tag}_universal", "latest_universal"
    found = universal_files(model) if is_universal else native_files(model, int(conversion.to[-1]))
    files = dict(found)
    stream = Stream(training.source, contents_of(files.values()), tell)
    for name, file in files.items():
        path = directory / tag / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=_FILE_BYTES) as into:
            file.write(into, stream)
    write_durably(directory / pointer, [tag.encode()])
    kept = {
        kind: {n for g in training.groups if kind in kinds_of(training, g) for n in g.names} for kind in training.states
    }
    states = [t for kind, of_kind in training.states.items() for n, t in of_kind.items() if n not in kept[kind]]
    client = [tensor for name, tensor in training.client.items() if not is_at_top(training, name)]
    return (*states, *client, *training.others)


def _to_ours(training: Training, directory: Place, conversion: Conversion, tell: Tell | None) -> Place:
    """A step of one rank; any number of ranks loads it."""
    source = training.source  # under our names
    objects = source.objects if conversion.groups is None else {**source.objects, "groups": _json(training)}
    description = dict(source.description) | {"converted_from": source.kind}
    return rewrite(source, directory, _step_of(training, conversion), objects, description, tell)


def _json(training: Training) -> JsonValue:
    """Groups as ``objects`` have them."""
    return [
        {"names": list(group.names), "settings": dict(group.settings), "numbers": dict(group.numbers)}
        for group in training.groups
    ]


def _step_of(training: Training, conversion: Conversion) -> int:
    step = conversion.step if conversion.step is not None else training.source.step
    if step is None:
        raise ForeignUnusable(
            training.source.path, "it does not say at which step it was saved", "Give it with --step."
        )
    return step


def _dtype_of(training: Training) -> str:
    """The type that the model computed with, as far as the source says."""
    config: Any = training.objects.get("config") or {}
    for key, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
        if (config.get(key) or {}).get("enabled"):
            return dtype
    return str(training.source.description.get("dtype") or "float32")

"""What a trainer tells its writer and what that answers: one JSON object per line.

Needs nothing but the standard library.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from evermesh.checkpoint.encoding import HeaderEntry, PlacedPart
from evermesh.checkpoint.merging import SavedMap
from evermesh.checkpoint.retention import Retention
from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of
from evermesh.checkpoint.stores.store import objects_of


@dataclass(frozen=True, slots=True)
class ArenaPart:
    """Some elements of a tensor, next to each other in the arena."""

    name: str
    """Of the tensor."""
    key: str
    """Under which other readers find it in a file."""
    code: str
    """Of its element type in a safetensors header."""
    shape: tuple[int, ...]
    num_bytes: int
    region: dict[str, Any]
    start: int
    """First element of the region's row-major storage."""
    stop: int

    @property
    def entry(self) -> HeaderEntry:
        """What the head of a file says about it."""
        return HeaderEntry(self.key, self.code, self.shape, self.num_bytes)

    @property
    def placed(self) -> PlacedPart:
        """What an index says about it, besides its place."""
        return PlacedPart(self.name, self.region, self.start, self.stop, self.num_bytes)


@dataclass(frozen=True)
class WriterPlan:
    """What does not change from save to save. Sent once."""

    rank: int
    directory: str
    digest: str
    """Of the shard map."""
    parts: tuple[ArenaPart, ...]
    """Of this rank, one after the other in the arena, larger elements first."""
    retention: Retention
    incremental: bool
    """Whether files that an older checkpoint holds are linked instead of written."""
    world_size: int
    patience_s: float | None = None
    """With an object store: how long a request is tried again, seconds."""
    parity: int | None = None
    """Ranks of a stripe; None: nothing protects their files."""
    saved: SavedMap | None = None
    """On rank 0."""

    @property
    def place(self) -> Place:
        """Of ``directory``."""
        place = place_of(self.directory)
        return place if self.patience_s is None or isinstance(place, Path) else place.with_patience(self.patience_s)

    @cached_property
    def offsets(self) -> list[int]:
        """Where every part begins in the arena, and where the last one ends."""
        return list(itertools.accumulate((part.num_bytes for part in self.parts), initial=0))

    def to_json(self) -> bytes:
        """One line."""
        return line_of({"kind": "plan"} | asdict(self))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "WriterPlan":
        """What ``to_json`` wrote, parsed."""
        fields = {name: value for name, value in values.items() if name != "kind"}
        parts = tuple(ArenaPart(**part | {"shape": tuple(part["shape"])}) for part in fields.pop("parts"))
        retention = Retention(**fields.pop("retention"))
        saved = fields.pop("saved")
        return cls(parts=parts, retention=retention, saved=SavedMap(**saved) if saved else None, **fields)


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Write what the arena holds now."""

    identity: str
    """Unlike that of any other save, also of earlier jobs in the same directory; equal on all ranks."""
    step: int
    objects: dict[str, Any] | None = None
    """On rank 0."""
    description: dict[str, Any] | None = None
    """On rank 0."""
    is_repeated: bool = False
    """Whether a writer that has ended had it before; what it had done, committed perhaps, is used."""

    def to_json(self) -> bytes:
        """One line."""
        return line_of({"kind": "save"} | asdict(self))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "SaveOrder":
        """What ``to_json`` wrote, parsed."""
        return cls(**{name: value for name, value in values.items() if name != "kind"})


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a save."""

    kind: Literal["written", "committed", "failed"]
    """``written``: the bytes of this rank are on the disk; ``committed``: on rank 0, the checkpoint is visible."""
    identity: str
    seconds: float
    """Since the order came."""
    bytes_written: int = 0
    """``written``: to data files by this rank, ``committed``: by all ranks; files that were linked are left out."""
    cause: str = ""
    errno: int | None = None

    def to_json(self) -> bytes:
        """One line."""
        return line_of(asdict(self))


def line_of(values: Mapping[str, Any]) -> bytes:
    """A message as one line. Numbers that are not finite become ``NaN`` and such."""
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def marker_name(identity: str) -> str:
    """The empty file in the temporary directory that tells writers of other ranks that it is ready for this save."""
    return f"begun-{identity}"


def temporary_names(directory: Place) -> Iterator[str]:
    """Names in a directory, none if it is missing. Read anew each time: file systems of several machines remember for long
    that a single name was absent."""
    if isinstance(directory, ObjectPath):
        yield from objects_of(directory).names(directory)
        return
    try:
        yield from (entry.name for entry in directory.iterdir())
    except FileNotFoundError:
        return

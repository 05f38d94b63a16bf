"""Bytes of lost or damaged files of a checkpoint, made again from parity and the other ranks of their stripe.

What comes out is only as good as what goes in: whoever asks compares it with the checksum that was saved.
"""

import itertools
import logging
from pathlib import Path

from evermesh.checkpoint.format import Manifest
from evermesh.checkpoint.parity import ParityPart, PayloadFiles, Stripes, exclusive_or

_log = logging.getLogger(__name__)


class Recovery:
    """Of one checkpoint with parity."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        assert manifest.parity is not None, "a checkpoint with parity"
        self._path, self._manifest = path, manifest
        self._stripes = Stripes(manifest.world_size, manifest.parity.width)
        self._told: set[str] = set()
        self._places: dict[str, tuple[int, int]] = {}
        for rank in range(manifest.world_size):
            payload = manifest.payload(rank)
            starts = itertools.accumulate(payload.values(), initial=0)
            self._places |= {name: (rank, start) for name, start in zip(payload, starts, strict=False)}
        self._parts: dict[int, list[ParityPart]] = {}
        for part in manifest.parity_parts:
            self._parts.setdefault(part.stripe, []).append(part)

    def bytes_of(self, name: str, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of a data file or an index, None where another file that they need is lost too."""
        rank, begin = self._places[name]
        try:
            return b"".join(
                self._of_part(part, rank, max(begin + start, part.start), min(begin + stop, part.stop))
                for part in self._parts.get(self._stripes.of_rank(rank), ())
                if part.start < begin + stop and begin + start < part.stop
            )
        except (OSError, EOFError):
            return None

    def tell(self, name: str) -> None:
        """Warn, once, that parts of a file were made again."""
        if name not in self._told:
            self._told.add(name)
            _log.warning(
                "%s is lost or damaged; what is read of it is made again from parity. Run: evermesh checkpoint repair %s",
                self._path / name,
                self._path,
            )

    def _of_part(self, part: ParityPart, rank: int, start: int, stop: int) -> bytes:
        others = [other for other in self._stripes.members(part.stripe) if other != rank]
        blocks = [self._read(self._manifest.payload(other), start, stop) for other in others]
        parity = self._read({part.name: part.stop - part.start}, start - part.start, stop - part.start)
        return bytes(exclusive_or(stop - start, iter([parity, *blocks])))

    def _read(self, sizes: dict[str, int], start: int, stop: int) -> bytes:
        with PayloadFiles(self._path, sizes) as files:
            return files.read(start, stop)

"""The finished parts of an unfinished preparation: one directory per input file, committed by renaming it.

A part is used again only if its input file and the settings are the same and its bytes still match its checksums, so
nothing here has to be flushed to disk: what a power loss took is made again.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from evermesh.runtime.data.corpus import Skipped
from evermesh.runtime.data.documents import InputFile
from evermesh.runtime.data.files import HashedFile, empty_folder, file_digest
from evermesh.runtime.data.tokenizer import Encoded

TOKENS, LENGTHS, MASK = "tokens.bin", "lengths.bin", "mask.bin"
_RECORD = "part.json"


class PartOrigin(BaseModel):
    """What a part was made from; equal origins give equal parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    mtime_ns: int
    settings: str
    """Everything else that decides the bytes: tokenizer, end token, fields of records."""

    @classmethod
    def of(cls, file: InputFile, settings: str) -> Self:
        """The origin of ``file`` as it is now."""
        status = file.path.stat()
        path = str(file.path.resolve()).encode(errors="backslashreplace").decode()  # names need not be UTF-8
        return cls(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns, settings=settings)


class PartRecord(BaseModel):
    """The content of ``part.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    origin: PartOrigin
    documents: int
    masked: bool
    skipped: Skipped
    digests: dict[str, str]
    """xxh3-64 of every file of the part."""


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part."""

    folder: Path
    record: PartRecord

    def lengths(self) -> NDArray[np.int64]:
        """Stored tokens of every document, the end token among them."""
        return np.fromfile(self.folder / LENGTHS, dtype="<i8")


class PartStore:
    """The directory of parts of one preparation."""

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, created where it is not there."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def finished(self, origin: PartOrigin) -> Part | None:
        """The part made from ``origin``, with its checksums verified; None when it has to be made."""
        folder = self._place(origin)
        try:
            record = PartRecord.model_validate_json((folder / _RECORD).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        if record.origin != origin or any(_differs(folder / file, digest) for file, digest in record.digests.items()):
            return None
        return Part(folder, record)

    def begin(self, origin: PartOrigin) -> "PartWriter":
        """A writer for the part of ``origin``; an older part of the same file goes when the new one is committed."""
        return PartWriter(self._place(origin), origin)

    def _place(self, origin: PartOrigin) -> Path:
        return self._folder / xxhash.xxh3_64_hexdigest(origin.path.encode())


class PartWriter:
    """Writes one part; without ``commit`` there is no part. Close it in any case."""

    def __init__(self, final: Path, origin: PartOrigin) -> None:
        """Begin the part that ``commit`` makes appear at ``final``."""
        self._final, self._origin = final, origin
        self._folder = empty_folder(final.with_name(f"{final.name}.tmp"))
        self._files = {name: HashedFile(self._folder / name, durable=False) for name in (TOKENS, LENGTHS, MASK)}
        self._documents, self._empty, self._masked = 0, 0, False

    def add(self, document: Encoded) -> None:
        """Append a document; one without tokens but the end token is counted and left out."""
        if len(document.tokens) == 1:
            self._empty += 1
            return
        counts = np.ones(len(document.tokens), np.uint8) if document.counts is None else document.counts
        self._masked |= document.counts is not None
        self._documents += 1
        self._files[TOKENS].write(document.tokens.data)
        self._files[LENGTHS].write(np.array([len(document.tokens)], dtype="<i8").data)
        self._files[MASK].write(counts.data)

    def commit(self, skipped: Skipped) -> Part:
        """Make the part appear; ``skipped`` is what its reader left out."""
        self.close()
        record = PartRecord(
            origin=self._origin,
            documents=self._documents,
            masked=self._masked,
            skipped=skipped + Skipped(empty_documents=self._empty),
            digests={name: file.digest for name, file in self._files.items()},
        )
        (self._folder / _RECORD).write_text(record.model_dump_json())
        shutil.rmtree(self._final, ignore_errors=True)
        self._folder.rename(self._final)
        return Part(self._final, record)

    def close(self) -> None:
        """Close the files; what is not on disk fully is discovered here."""
        with ExitStack() as closing:
            for file in self._files.values():
                closing.callback(file.close)


def total_skipped(parts: Sequence[Part]) -> Skipped:
    """What the readers of all parts left out."""
    return sum((part.record.skipped for part in parts), start=Skipped())


def _differs(path: Path, digest: str) -> bool:
    return not path.is_file() or file_digest(path) != digest

"""A corpus on disk: the token ids of many documents, memory-mapped.

Every document is stored as its ids and one end token. A document of n ids is a sequence of n tokens: the inputs are
``stored[0:n]``, the targets ``stored[1:n+1]``. The files of the directory are listed in the README of this room.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from evermesh.runtime.data.errors import CorpusInvalid, OutOfRange
from evermesh.runtime.data.files import file_digest

FORMAT_VERSION = 1
MANIFEST, TOKENS, INDEX, MASK, TOKENIZER, FILES = (
    "corpus.json",
    "tokens.bin",
    "index.npy",
    "mask.bin",
    "tokenizer.json",
    "files.json",
)
_REQUIRED = {TOKENS, INDEX, TOKENIZER, FILES}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Frozen):
    """Size and checksum of one file of a corpus."""

    num_bytes: NonNegativeInt
    xxh3_64: str
    """Hexadecimal."""


class Skipped(_Frozen):
    """What a preparation left out."""

    binary_files: NonNegativeInt = 0
    """Files with a NUL byte in their first 8 KiB."""
    empty_documents: NonNegativeInt = 0
    """Documents without any token."""
    invalid_records: NonNegativeInt = 0
    """Records of the wrong form, when the preparation was told to skip them."""

    def __add__(self, other: "Skipped") -> "Skipped":
        mine, theirs = self.model_dump(), other.model_dump()
        return Skipped(**{field: mine[field] + theirs[field] for field in mine})


class Manifest(_Frozen):
    """The content of ``corpus.json``; readers refuse unknown fields and unknown format versions."""

    format_version: int = FORMAT_VERSION
    name: str
    documents: PositiveInt
    stored_tokens: PositiveInt
    """Tokens in ``tokens.bin``, the end token of every document among them."""
    vocabulary: PositiveInt
    """Every token id is below it."""
    end_token: NonNegativeInt
    """Id of the token that ends every document."""
    tokenizer_digest: str
    files: dict[str, FileRecord]
    skipped: Skipped = Skipped()


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The type of stored token ids: the smaller of uint16 and uint32 that holds them, little endian."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


class Corpus:
    """A corpus, memory-mapped; reading takes only the pages that hold the asked tokens."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Map the files of ``path``; use ``Corpus.open``, which checks them first."""
        self.path, self.manifest = path, manifest
        self._tokens = np.memmap(path / TOKENS, dtype=token_dtype(manifest.vocabulary), mode="r")
        self._offsets: NDArray[np.int64] = np.load(path / INDEX, mmap_mode="r", allow_pickle=False)
        self.bytes_read = 0
        """Bytes of tokens and masks that ``read`` took from the files since this was opened."""
        self._mask = np.memmap(path / MASK, dtype=np.uint8, mode="r") if MASK in manifest.files else None

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the corpus in the directory ``path``; checks format and sizes, not every byte (see ``verify``).

        Raises:
            CorpusInvalid: it is missing, truncated, of another version, or its files contradict each other.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        _check_sizes(path, manifest)
        try:
            corpus = cls(path, manifest)
        except (ValueError, OSError, EOFError) as error:
            raise CorpusInvalid(f"corpus {path} cannot be mapped: {error}. Remove it and prepare it again.") from error
        corpus._check_index()
        return corpus

    def __len__(self) -> int:
        """Number of documents."""
        return self.manifest.documents

    @property
    def name(self) -> str:
        """Name given at preparation."""
        return self.manifest.name

    @property
    def vocabulary(self) -> int:
        """Every token id is below it."""
        return self.manifest.vocabulary

    @property
    def end_token(self) -> int:
        """Id of the token that ends every document."""
        return self.manifest.end_token

    @property
    def tokenizer_digest(self) -> str:
        """Identity of the tokenizer, equal for equal tokenizers however their files are laid out."""
        return self.manifest.tokenizer_digest

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences: every one is an input once per epoch."""
        return self.manifest.stored_tokens - self.manifest.documents

    @property
    def masked(self) -> bool:
        """True when some tokens do not count in the loss."""
        return self._mask is not None

    @functools.cached_property
    def digest(self) -> str:
        """Identity of the content: equal for corpora with the same tokens, documents and loss mask."""
        content = [self.manifest.tokenizer_digest, str(self.manifest.end_token)]
        content += [
            f"{file}:{self.manifest.files[file].xxh3_64}"
            for file in (TOKENS, INDEX, MASK)
            if file in self.manifest.files
        ]
        return hashlib.blake2b("\n".join(content).encode(), digest_size=16).hexdigest()

    @functools.cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document as a sequence, shape (documents,), each at least 1.

        Raises:
            CorpusInvalid: the index is damaged.
        """
        lengths: NDArray[np.int64] = np.diff(self._offsets) - 1
        if lengths.min() < 1:
            document = int(lengths.argmin())
            raise CorpusInvalid(
                f"corpus {self.path}: {INDEX} gives document {document} a length of {lengths[document]}. "
                f"Remove it and prepare it again."
            )
        return lengths

    def length(self, document: int) -> int:
        """Tokens of ``document`` as a sequence."""
        return int(self._offsets[document + 1] - self._offsets[document]) - 1

    def read(
        self, document: int, start: int, stop: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [start, stop) of ``document``: inputs, targets, and which targets count in the loss.

        Each of shape (stop - start,). The last target of a document is the end token.

        Raises:
            OutOfRange: the range leaves the document.
        """
        if not 0 <= document < len(self):
            raise OutOfRange(self.name, document, start, stop, 0)
        if not 0 <= start <= stop <= self.length(document):
            raise OutOfRange(self.name, document, start, stop, self.length(document))
        first = int(self._offsets[document])
        stored = self._tokens[first + start : first + stop + 1]
        self.bytes_read += stored.nbytes
        if self._mask is None:
            counts = np.ones(stop - start, dtype=np.bool_)
        else:
            mask = self._mask[first + start + 1 : first + stop + 1]
            self.bytes_read += mask.nbytes
            counts = mask.astype(np.bool_)
        ids = stored.astype(np.int64)
        return ids[:-1], ids[1:], counts

    def document_name(self, document: int) -> str:
        """Relative path of the file that held ``document``; ``path:n`` when it is number n of several in that file."""
        if not 0 <= document < len(self):
            raise OutOfRange(self.name, document, 0, 0, 0)
        file = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        name, documents = self._files[file]
        return name if documents == 1 else f"{name}:{document - int(self._first_documents[file])}"

    def verify(self) -> None:
        """Read every byte and compare the checksums.

        Raises:
            CorpusInvalid: a file differs from what was prepared; names the file.
        """
        for file, record in self.manifest.files.items():
            if (found := file_digest(self.path / file)) != record.xxh3_64:
                raise CorpusInvalid(
                    f"corpus {self.path}: {file} has xxh3-64 {found}, but {record.xxh3_64} was written. "
                    f"Remove it and prepare it again."
                )
        self.lengths  # noqa: B018  checks the index

    @functools.cached_property
    def _files(self) -> list[tuple[str, int]]:
        return [(name, documents) for name, documents in json.loads((self.path / FILES).read_bytes()) if documents]

    @functools.cached_property
    def _first_documents(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(documents for _, documents in self._files)])

    def _check_index(self) -> None:
        expected = (self.manifest.documents + 1,)
        if self._offsets.shape != expected or self._offsets.dtype != np.int64:
            raise CorpusInvalid(
                f"corpus {self.path}: {INDEX} has shape {self._offsets.shape} of {self._offsets.dtype}, but "
                f"{self.manifest.documents} documents need {expected} of int64. Remove it and prepare it again."
            )
        if (ends := (int(self._offsets[0]), int(self._offsets[-1]))) != (0, self.manifest.stored_tokens):
            raise CorpusInvalid(
                f"corpus {self.path}: {INDEX} covers tokens {ends}, but {TOKENS} has {self.manifest.stored_tokens:,}. "
                f"Remove it and prepare it again."
            )


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusInvalid(
            f"{path} is not a corpus: there is no {MANIFEST} in it. Make one with: evermesh data prepare."
        ) from None
    except ValueError as error:
        raise CorpusInvalid(
            f"corpus {path}: {MANIFEST} is not JSON ({error}). Remove it and prepare it again."
        ) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise CorpusInvalid(
            f"corpus {path} has format version {version}; this program reads {FORMAT_VERSION}. Remove it and "
            f"prepare it again, or use the program that made it."
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise CorpusInvalid(
            f"corpus {path}: {MANIFEST} has {error.error_count()} errors, first: {error.errors()[0]}"
        ) from error


def _check_sizes(path: Path, manifest: Manifest) -> None:
    if missing := _REQUIRED - manifest.files.keys():
        raise CorpusInvalid(
            f"corpus {path}: {MANIFEST} lists no {', '.join(sorted(missing))}. Remove it and prepare it again."
        )
    if unknown := manifest.files.keys() - _REQUIRED - {MASK}:
        raise CorpusInvalid(
            f"corpus {path}: {MANIFEST} lists unknown files {sorted(unknown)}. Remove it and prepare it again."
        )
    for file, record in manifest.files.items():
        if not (path / file).is_file():
            raise CorpusInvalid(f"corpus {path}: {file} is missing. Remove it and prepare it again.")
        if (found := (path / file).stat().st_size) != record.num_bytes:
            raise CorpusInvalid(
                f"corpus {path}: {file} has {found:,} bytes, but {record.num_bytes:,} were written. "
                f"Remove it and prepare it again."
            )
    token_bytes = manifest.stored_tokens * token_dtype(manifest.vocabulary).itemsize
    if manifest.files[TOKENS].num_bytes != token_bytes:
        raise CorpusInvalid(
            f"corpus {path}: {TOKENS} has {manifest.files[TOKENS].num_bytes:,} bytes, but {manifest.stored_tokens:,} "
            f"tokens of a vocabulary of {manifest.vocabulary:,} take {token_bytes:,}. Remove it and prepare it again."
        )
    if MASK in manifest.files and manifest.files[MASK].num_bytes != manifest.stored_tokens:
        raise CorpusInvalid(
            f"corpus {path}: {MASK} has {manifest.files[MASK].num_bytes:,} bytes for {manifest.stored_tokens:,} "
            f"tokens. Remove it and prepare it again."
        )

"""Input files of a preparation and the documents in them: text, JSON lines, Parquet."""

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from evermesh.runtime.data.errors import DocumentInvalid, ExtraMissing, InputNotFound

Spans = tuple[tuple[int, int], ...]
_BINARY_PROBE_BYTES = 8192
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to read documents from."""

    path: Path
    name: str
    """How the corpus calls it: its path relative to the input that was given."""


@dataclass(frozen=True, slots=True)
class RecordFields:
    """Where the records of JSON lines and Parquet files hold text and loss mask."""

    text: str = "text"
    loss_spans: str = "loss_spans"
    """List of character ranges [start, end) of the text that count in the loss; absent or null: everything counts."""
    messages: str = "messages"
    """List of {role, content}, read where a record has no text; only the content of assistants counts in the loss."""
    skip_invalid: bool = False
    """Count records of the wrong form instead of raising ``DocumentInvalid``."""


@dataclass(frozen=True, slots=True)
class Document:
    """The text of a document and the characters that count in the loss."""

    text: str
    spans: Spans | None = None
    """Character ranges [start, end); None: everything counts."""


def find_inputs(inputs: Iterable[Path | InputFile]) -> list[InputFile]:
    """The files of ``inputs``, in the order given; directories are walked, their files sorted by relative path.

    Hidden files and directories inside a directory are left out.

    Raises:
        InputNotFound: an input does not exist.
    """
    files: list[InputFile] = []
    for given in inputs:
        if isinstance(given, InputFile):
            files.append(given)
        elif given.is_dir():
            files += walk(given)
        elif given.exists():
            files.append(InputFile(given, given.name))
        else:
            raise InputNotFound(f"input {given} does not exist. Name a file or a directory that is there.")
    return files


def walk(root: Path, skipped_folders: frozenset[str] = frozenset()) -> list[InputFile]:
    """All regular files below ``root`` but hidden ones and those in folders named in ``skipped_folders``, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped_folders and not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [InputFile(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    return sorted(found, key=lambda file: file.name)


def read_documents(file: InputFile, fields: RecordFields, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of ``file``, possibly empty ones; what is left out is counted in ``skipped``, by ``Skipped`` field.

    Raises:
        DocumentInvalid: the file is damaged, or a record has the wrong form and ``fields.skip_invalid`` is off.
        ExtraMissing: a Parquet file without pyarrow.
    """
    if file.path.name.endswith(".parquet"):
        yield from _from_records(_parquet_records(file), file, fields, skipped)
    elif _is_binary(file):
        skipped["binary_files"] += 1
    elif file.path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _from_records(_json_records(file), file, fields, skipped)
    else:
        yield Document(file.path.read_bytes().decode("utf-8-sig", errors="replace"))


def _open(file: InputFile) -> BinaryIO:
    if file.path.name.endswith(".jsonl.gz"):
        return cast(BinaryIO, gzip.open(file.path, "rb"))
    return file.path.open("rb")


def _is_binary(file: InputFile) -> bool:
    with _gzip_errors(file), _open(file) as stream:
        return b"\0" in stream.read(_BINARY_PROBE_BYTES)


@contextmanager
def _gzip_errors(file: InputFile) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DocumentInvalid(f"{file.path} is not a complete gzip file: {error}. Fetch it again.") from error


def _json_records(file: InputFile) -> Iterator[tuple[int, Any]]:
    """Line number and parsed line; a line that is not JSON comes as the ``ValueError``."""
    with _gzip_errors(file), _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")


def _parquet_records(file: InputFile) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ExtraMissing(
            f"{file.path} is a Parquet file, and pyarrow is not installed. Run: pip install 'evermesh[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except pyarrow.ArrowInvalid as error:
        raise DocumentInvalid(f"{file.path} is not a complete Parquet file: {error}. Fetch it again.") from error


def _from_records(
    records: Iterable[tuple[int, Any]], file: InputFile, fields: RecordFields, skipped: Counter[str]
) -> Iterator[Document]:
    for number, record in records:
        try:
            yield _document(record, fields)
        except _WrongFormError as error:
            if not fields.skip_invalid:
                raise DocumentInvalid(
                    f"{file.path}, record {number}: {error}. Correct it, name other fields, or skip invalid records."
                ) from None
            skipped["invalid_records"] += 1


class _WrongFormError(Exception):
    """What is wrong with a record."""


def _document(record: Any, fields: RecordFields) -> Document:
    if isinstance(record, ValueError):
        raise _WrongFormError(str(record))
    if not isinstance(record, Mapping):
        raise _WrongFormError(f"a record is an object, this is a {type(record).__name__}")
    if record.get(fields.text) is None and record.get(fields.messages) is not None:
        return _conversation(record[fields.messages])
    text = record.get(fields.text)
    if not isinstance(text, str):
        found = f"is a {type(text).__name__}" if fields.text in record else f"is not among {sorted(record)}"
        raise _WrongFormError(f"field {fields.text!r} {found}, a string is needed")
    return Document(_clean(text), _spans(record.get(fields.loss_spans), len(text)))


def _spans(value: Any, length: int) -> Spans | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _WrongFormError(f"loss spans are a list of [start, end), not a {type(value).__name__}")
    return tuple(_span(span, length) for span in value)


def _span(span: Any, length: int) -> tuple[int, int]:
    match span:
        case [int(start), int(end)] if 0 <= start <= end <= length:
            return start, end
    raise _WrongFormError(
        f"loss span {span!r} is not [start, end) with 0 <= start <= end <= {length}, the text's characters"
    )


def _conversation(messages: Any) -> Document:
    """Every message as a line ``<|role|>`` and its content, separated by line breaks."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise _WrongFormError(f"messages are a list of {{role, content}}, not a {type(messages).__name__}")
    text, spans = "", []
    for role, content in map(_message, messages):
        separator = "\n" if text else ""
        text += f"{separator}<|{role}|>\n{content}"
        if role == "assistant":
            spans.append((len(text) - len(content), len(text)))
    return Document(_clean(text), tuple(spans))


def _message(message: Any) -> tuple[str, str]:
    match message:
        case {"role": str(role), "content": str(content)}:
            return role, content
    raise _WrongFormError(f"a message is {{role, content}} of strings, this is {message!r:.80}")


def _clean(text: str) -> str:
    """``text`` with U+FFFD for lone surrogates, which no encoding of Unicode can hold; positions stay."""
    return _LONE_SURROGATE.sub("\ufffd", text)

"""From text, JSON lines and Parquet files to a corpus, resumable after any interruption.

NAME.partial/tokenizer/     the trained tokenizer and what it was trained on
NAME.partial/parts/         one finished part per input file
NAME.partial/corpus/        the corpus while it is assembled; renamed to NAME when it is complete
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evermesh.runtime.data import corpus as layout
from evermesh.runtime.data import parts as part_layout
from evermesh.runtime.data.corpus import FORMAT_VERSION, Corpus, FileRecord, Manifest, Skipped
from evermesh.runtime.data.documents import Document, InputFile, RecordFields, find_inputs, read_documents
from evermesh.runtime.data.errors import CorpusEmpty, CorpusExists, InputNotFound
from evermesh.runtime.data.files import HashedFile, commit_folder, empty_folder, exclusive, name_full_disk
from evermesh.runtime.data.parts import Part, PartOrigin, PartStore, total_skipped
from evermesh.runtime.data.tokenizer import Codec, Encoded, TokenizerFile, TokenizerSource, TrainBpe, train_bpe

Progress = Callable[[int, int, str], None]
"""Called with input files done, input files in all, and the name of the one just done."""

_CHUNK_CHARACTERS = 1 << 21


def prepare(
    inputs: Sequence[Path | InputFile],
    output: Path,
    tokenizer: TokenizerSource,
    fields: RecordFields | None = None,
    *,
    progress: Progress | None = None,
    wait_s: float = 0.0,
) -> Corpus:
    """Make the corpus ``output`` from files and directories; run again after an interruption, it goes on.

    Files named ``.jsonl``, ``.jsonl.gz`` and ``.parquet`` hold one document per record, any other file is one document.
    The result does not depend on interruptions: its bytes are the same. Until it has ended it takes about 2.5 times
    the space of the corpus.

    Args:
        wait_s: seconds to wait for another process that prepares the same corpus.

    Raises:
        CorpusExists: ``output`` is there already.
        CorpusBusy: another process prepares it and did not end within ``wait_s``.
        InputNotFound: an input or the tokenizer does not exist.
        DocumentInvalid: a file or record has the wrong form.
        ExtraMissing: a Parquet file, and pyarrow is not installed.
        CorpusEmpty: nothing is left after skipping binary files, empty documents and invalid records.
        TokenizerInvalid: the tokenizer cannot be read or has no end token.
        DiskFull: finished parts stay for the next run.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(output.with_name(f"{output.name}.lock"), wait_s), name_full_disk(output.parent):
        partial = output.with_name(f"{output.name}.partial")
        if output.exists():
            raise CorpusExists(f"{output} is there already. Remove it, or choose another output.")
        files = find_inputs(inputs)
        fields = fields or RecordFields()
        try:
            codec = _codec(tokenizer, files, fields, partial / "tokenizer")
            parts = _make_parts(files, codec, fields, PartStore(partial / "parts"), progress)
            _check_not_empty(parts, files)
        except CorpusEmpty:
            shutil.rmtree(partial, ignore_errors=True)  # nothing in it to go on with
            raise
        _assemble(empty_folder(partial / "corpus"), output, _Content(files, parts, codec))
        shutil.rmtree(partial, ignore_errors=True)
    return Corpus.open(output)


@dataclass(frozen=True, slots=True)
class _Content:
    """Everything that goes into a corpus; ``parts`` in the order of ``files``."""

    files: Sequence[InputFile]
    parts: Sequence[Part]
    codec: Codec


@dataclass(frozen=True, slots=True)
class _EndOfFile:
    """Stands behind the last document of a file in a stream of documents."""

    skipped: Skipped


def _codec(source: TokenizerSource, files: Sequence[InputFile], fields: RecordFields, kept: Path) -> Codec:
    if isinstance(source, TokenizerFile):
        try:
            return Codec(source.path.read_bytes(), source.end_token)
        except FileNotFoundError:
            raise InputNotFound(
                f"tokenizer {source.path} does not exist. Name a tokenizer.json that is there."
            ) from None
    request = _training_request(source, files, fields)
    if not (kept / "request").exists() or (kept / "request").read_text() != request:
        _train(source, files, fields, request, kept)
    return Codec((kept / layout.TOKENIZER).read_bytes())


def _train(source: TrainBpe, files: Sequence[InputFile], fields: RecordFields, request: str, kept: Path) -> None:
    texts = (document.text for file in files for document in read_documents(file, fields, Counter()))
    content = train_bpe(texts, source.vocabulary)
    built = empty_folder(kept.with_name(f"{kept.name}.tmp"))
    for name, block in ((layout.TOKENIZER, content), ("request", request.encode())):
        with HashedFile(built / name, durable=True) as file:
            file.write(block)
    shutil.rmtree(kept, ignore_errors=True)
    commit_folder(built, kept)


def _training_request(source: TrainBpe, files: Sequence[InputFile], fields: RecordFields) -> str:
    origins = [PartOrigin.of(file, "").model_dump_json() for file in files]
    return hashlib.blake2b("\n".join([repr(source), repr(fields), *origins]).encode(), digest_size=16).hexdigest()


def _make_parts(
    files: Sequence[InputFile], codec: Codec, fields: RecordFields, store: PartStore, progress: Progress | None
) -> list[Part]:
    """The part of every file, in order: those that are finished as they are, the others made now."""
    settings = f"{FORMAT_VERSION} {codec.digest} {codec.end_token} {fields!r}"
    origins = [PartOrigin.of(file, settings) for file in files]
    parts = [store.finished(origin) for origin in origins]
    missing = [number for number, part in enumerate(parts) if part is None]
    stream = _encoded(_documents([files[number] for number in missing], fields), codec)
    for done, number in enumerate(missing, start=len(files) - len(missing) + 1):
        parts[number] = _write_part(store, origins[number], stream)
        if progress is not None:
            progress(done, len(files), files[number].name)
    return [part for part in parts if part is not None]


def _documents(files: Sequence[InputFile], fields: RecordFields) -> Iterator[Document | _EndOfFile]:
    for file in files:
        skipped: Counter[str] = Counter()
        yield from read_documents(file, fields, skipped)
        yield _EndOfFile(Skipped(**skipped))


def _encoded(stream: Iterator[Document | _EndOfFile], codec: Codec) -> Iterator[Encoded | _EndOfFile]:
    """Encode a stream in chunks that keep all cores busy, across the borders of files."""
    for chunk in _chunks(stream):
        encoded = iter(codec.encode([item for item in chunk if isinstance(item, Document)]))
        for item in chunk:
            yield next(encoded) if isinstance(item, Document) else item


def _chunks(stream: Iterator[Document | _EndOfFile]) -> Iterator[list[Document | _EndOfFile]]:
    chunk: list[Document | _EndOfFile] = []
    characters = 0
    for item in stream:
        chunk.append(item)
        characters += len(item.text) if isinstance(item, Document) else 0
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    yield chunk


def _write_part(store: PartStore, origin: PartOrigin, stream: Iterator[Encoded | _EndOfFile]) -> Part:
    """Write the documents of ``stream`` up to the next end of a file."""
    with closing(store.begin(origin)) as writer:
        for item in stream:
            if isinstance(item, _EndOfFile):
                return writer.commit(item.skipped)
            writer.add(item)
    raise AssertionError(f"the stream ended before the end of {origin.path}")


def _check_not_empty(parts: Sequence[Part], files: Sequence[InputFile]) -> None:
    if any(part.record.documents for part in parts):
        return
    skipped = total_skipped(parts)
    raise CorpusEmpty(
        f"{len(files)} input files hold no document: {skipped.binary_files} binary files, {skipped.empty_documents} "
        f"empty documents and {skipped.invalid_records} invalid records were skipped. Give files with text."
    )


def _assemble(folder: Path, output: Path, content: _Content) -> None:
    """Write the files of the corpus to ``folder``, flush them to disk, and make it appear as ``output``."""
    records = {
        layout.TOKENS: _concatenate(folder / layout.TOKENS, content.parts, part_layout.TOKENS),
        layout.INDEX: _write_index(folder / layout.INDEX, content.parts),
        layout.TOKENIZER: _write(folder / layout.TOKENIZER, content.codec.content),
        layout.FILES: _write(folder / layout.FILES, _file_list(content)),
    }
    if any(part.record.masked for part in content.parts):
        records[layout.MASK] = _concatenate(folder / layout.MASK, content.parts, part_layout.MASK)
    manifest = Manifest(
        name=output.name,
        documents=sum(part.record.documents for part in content.parts),
        stored_tokens=records[layout.TOKENS].num_bytes // content.codec.dtype.itemsize,
        vocabulary=content.codec.vocabulary,
        end_token=content.codec.end_token,
        tokenizer_digest=content.codec.digest,
        files=records,
        skipped=total_skipped(content.parts),
    )
    _write(folder / layout.MANIFEST, manifest.model_dump_json(indent=2).encode())
    commit_folder(folder, output)


def _concatenate(path: Path, parts: Sequence[Part], name: str) -> FileRecord:
    with HashedFile(path, durable=True) as file:
        for part in parts:
            file.append(part.folder / name)
    return FileRecord(num_bytes=file.num_bytes, xxh3_64=file.digest)


def _write_index(path: Path, parts: Sequence[Part]) -> FileRecord:
    offsets = np.concatenate([np.zeros(1, np.int64), *(part.lengths() for part in parts)]).cumsum()
    with HashedFile(path, durable=True) as file:
        np.lib.format.write_array(file, offsets, allow_pickle=False)
    return FileRecord(num_bytes=file.num_bytes, xxh3_64=file.digest)


def _write(path: Path, content: bytes) -> FileRecord:
    with HashedFile(path, durable=True) as file:
        file.write(content)
    return FileRecord(num_bytes=file.num_bytes, xxh3_64=file.digest)


def _file_list(content: _Content) -> bytes:
    """Name and number of documents of every input file, in the order of the documents."""
    entries = zip(content.files, content.parts, strict=True)
    return json.dumps([[file.name, part.record.documents] for file, part in entries]).encode()

"""Reading corpora, and refusing what is not one."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from evermesh.runtime.data import Corpus, CorpusInvalid, OutOfRange
from tests.runtime.data.written import END, write_corpus, write_manifest

LENGTHS = [5, 1, 12]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", LENGTHS).path


def stored(path: Path, document: int) -> NDArray[np.int64]:
    tokens = np.fromfile(path / "tokens.bin", dtype="<u2").astype(np.int64)
    return np.split(tokens, np.cumsum([length + 1 for length in LENGTHS]))[document]


def test_a_corpus_written_from_the_description_of_the_format_reads_back(path: Path) -> None:
    corpus = Corpus.open(path)
    corpus.verify()
    assert len(corpus) == 3
    assert corpus.lengths.tolist() == LENGTHS == [corpus.length(document) for document in range(3)]
    assert corpus.num_tokens == sum(LENGTHS)
    for document in range(3):
        inputs, targets, counts = corpus.read(document, 0, corpus.length(document))
        assert np.array_equal(inputs, stored(path, document)[:-1])
        assert np.array_equal(targets, stored(path, document)[1:])
        assert targets[-1] == END
        assert counts.all()


def test_every_range_of_a_document_is_the_slice_of_the_whole(path: Path) -> None:
    corpus = Corpus.open(path)
    whole = corpus.read(2, 0, 12)
    for start in range(13):
        for stop in range(start, 13):
            for part, all_tokens in zip(corpus.read(2, start, stop), whole, strict=True):
                assert np.array_equal(part, all_tokens[start:stop])


def test_tokens_are_read_as_int64_and_counts_as_bool(path: Path) -> None:
    inputs, targets, counts = Corpus.open(path).read(0, 1, 3)
    assert [str(array.dtype) for array in (inputs, targets, counts)] == ["int64", "int64", "bool"]


def test_the_mask_belongs_to_the_target(path: Path) -> None:
    mask = np.zeros(sum(LENGTHS) + 3, dtype=np.uint8)
    mask[2] = mask[5] = 1  # the third token of the first document, and its end token
    mask.tofile(path / "mask.bin")
    write_manifest(path, documents=3)
    corpus = Corpus.open(path)
    assert corpus.masked
    assert corpus.read(0, 0, 5)[2].tolist() == [False, True, False, False, True]
    assert corpus.read(0, 1, 3)[2].tolist() == [True, False]


@pytest.mark.parametrize("asked", [(0, 0, 6), (0, -1, 2), (0, 3, 2), (3, 0, 1), (-1, 0, 1)])
def test_a_range_outside_a_document_is_refused(path: Path, asked: tuple[int, int, int]) -> None:
    with pytest.raises(OutOfRange, match=f"document {asked[0]}"):
        Corpus.open(path).read(*asked)


@pytest.mark.parametrize("file", ["corpus.json", "tokens.bin", "index.npy", "tokenizer.json", "files.json"])
def test_a_missing_file_is_named(path: Path, file: str) -> None:
    (path / file).unlink()
    with pytest.raises(CorpusInvalid, match=file):
        Corpus.open(path)


@pytest.mark.parametrize("file", ["tokens.bin", "index.npy", "tokenizer.json", "files.json"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_named_with_both_sizes(path: Path, file: str, change: int) -> None:
    size = (path / file).stat().st_size
    (path / file).write_bytes((path / file).read_bytes()[: size + min(change, 0)] + b"x" * max(change, 0))
    with pytest.raises(CorpusInvalid, match=rf"{file} has {size + change:,} bytes, but {size:,}"):
        Corpus.open(path)


@pytest.mark.parametrize("file", ["tokens.bin", "index.npy", "tokenizer.json", "files.json"])
def test_a_flipped_bit_is_found_by_verify(path: Path, file: str) -> None:
    corpus = Corpus.open(path)
    content = bytearray((path / file).read_bytes())
    content[-1] ^= 1
    (path / file).write_bytes(content)
    with pytest.raises(CorpusInvalid, match=rf"{file} has xxh3-64"):
        corpus.verify()


def test_a_truncated_manifest_is_refused(path: Path) -> None:
    manifest = (path / "corpus.json").read_bytes()
    for size in range(0, len(manifest), 7):
        (path / "corpus.json").write_bytes(manifest[:size])
        with pytest.raises(CorpusInvalid):
            Corpus.open(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "format version 2; this program reads 1"),
        ("documents", 4, "4 documents need"),
        ("stored_tokens", 20, "20 tokens"),
        ("vocabulary", 70_000, "70,000"),
        ("surprise", 1, "surprise"),
        ("files", {}, "lists no"),
    ],
)
def test_a_manifest_that_contradicts_the_files_is_refused(path: Path, field: str, value: object, message: str) -> None:
    manifest = json.loads((path / "corpus.json").read_text())
    (path / "corpus.json").write_text(json.dumps({**manifest, field: value}))
    with pytest.raises(CorpusInvalid, match=message):
        Corpus.open(path)


def test_an_index_of_pickled_objects_is_not_loaded(path: Path) -> None:
    np.save(path / "index.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    write_manifest(path, documents=3)
    with pytest.raises(CorpusInvalid, match="cannot be mapped"):
        Corpus.open(path)


def test_an_index_that_runs_backwards_is_refused(path: Path) -> None:
    np.save(path / "index.npy", np.array([0, 9, 7, 21], dtype=np.int64))
    write_manifest(path, documents=3)
    with pytest.raises(CorpusInvalid, match="document 1 a length of -3"):
        Corpus.open(path).verify()


def test_a_file_is_not_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    for path in (tmp_path / "text", tmp_path / "nothing", tmp_path):
        with pytest.raises(CorpusInvalid, match="is not a corpus"):
            Corpus.open(path)


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    here, there = write_corpus(tmp_path / "here", LENGTHS), write_corpus(tmp_path / "there", LENGTHS)
    other = write_corpus(tmp_path / "other", LENGTHS, seed=1)
    assert here.digest == there.digest != other.digest

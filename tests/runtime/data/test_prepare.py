"""From files to a corpus, checked against the tokenizer applied to every document directly."""

import gzip
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from evermesh.runtime.data import (
    Corpus,
    CorpusBusy,
    CorpusEmpty,
    CorpusExists,
    DiskFull,
    DocumentInvalid,
    ExtraMissing,
    InputNotFound,
    RecordFields,
    TokenizerFile,
    TokenizerInvalid,
    TrainBpe,
    files,
    prepare,
)
from evermesh.runtime.data.documents import find_inputs
from evermesh.runtime.data.files import exclusive
from tests.runtime.data.conftest import TEXTS

PrepareRecords = Callable[[Sequence[dict[str, Any]]], Corpus]


def documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.read(document, 0, corpus.length(document))[0].tolist() for document in range(len(corpus))]


def encoded(tokenizer_file: Path, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return [tokenizer.encode(text).ids for text in texts]


def write_texts(folder: Path, texts: Sequence[str] = TEXTS) -> Path:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return folder


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_reading_back_equals_encoding_each_document(tmp_path: Path, tokenizer_file: Path) -> None:
    corpus = prepare([write_texts(tmp_path / "texts")], tmp_path / "corpus", TokenizerFile(tokenizer_file))
    corpus.verify()
    assert documents(corpus) == encoded(tokenizer_file, TEXTS)
    assert corpus.end_token == Tokenizer.from_file(str(tokenizer_file)).token_to_id("<|end|>")
    assert corpus.vocabulary == Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    assert not corpus.masked


def test_text_json_lines_gzip_and_parquet_give_the_same_documents(tmp_path: Path, tokenizer_file: Path) -> None:
    records = [{"text": text, "other": 1} for text in TEXTS]
    plain = write_jsonl(tmp_path / "a.jsonl", records)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    inputs = [write_texts(tmp_path / "texts"), plain, tmp_path / "a.jsonl.gz", tmp_path / "a.parquet"]
    corpora = [
        prepare([path], tmp_path / f"corpus{number}", TokenizerFile(tokenizer_file))
        for number, path in enumerate(inputs)
    ]
    assert len({corpus.digest for corpus in corpora}) == 1
    together = prepare(inputs, tmp_path / "together", TokenizerFile(tokenizer_file))
    assert documents(together) == encoded(tokenizer_file, TEXTS * 4)


def test_documents_are_named_by_file_and_place(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = write_texts(tmp_path / "texts", ["one", "", "two"])
    (folder / "deeper").mkdir()
    write_jsonl(folder / "deeper" / "b.jsonl", [{"text": "x"}, {"text": "y"}])
    corpus = prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file))
    names = [corpus.document_name(document) for document in range(len(corpus))]
    assert names == ["0.txt", "2.txt", "deeper/b.jsonl:0", "deeper/b.jsonl:1"]


def test_a_document_of_one_token_is_kept_and_one_of_none_is_counted(prepare_records: PrepareRecords) -> None:
    corpus = prepare_records([{"text": "a"}, {"text": ""}, {"text": "b"}])
    assert corpus.lengths.tolist() == [1, 1]
    assert corpus.read(0, 0, 1)[1].tolist() == [corpus.end_token]
    assert corpus.manifest.skipped.empty_documents == 1


def test_text_that_spells_the_end_token_is_not_an_end(prepare_records: PrepareRecords) -> None:
    corpus = prepare_records([{"text": "before<|end|>after"}])
    assert corpus.end_token not in documents(corpus)[0]


def test_truncation_and_padding_in_the_tokenizer_file_do_not_matter(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "cut.json"))
    folder = write_texts(tmp_path / "texts")
    cut = prepare([folder], tmp_path / "cut", TokenizerFile(tmp_path / "cut.json"))
    whole = prepare([folder], tmp_path / "whole", TokenizerFile(tokenizer_file))
    assert documents(cut) == documents(whole)
    assert cut.tokenizer_digest == whole.tokenizer_digest


def test_vocabularies_over_65536_are_stored_in_four_bytes(tmp_path: Path) -> None:
    entries = {f"w{number}": number for number in range(70_000)} | {"<|end|>": 70_000}
    model = {"type": "WordLevel", "vocab": entries, "unk_token": "w0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_texts(tmp_path / "texts", ["w5 w69999 w65536"])
    corpus = prepare([tmp_path / "texts"], tmp_path / "corpus", TokenizerFile(tmp_path / "tokenizer.json"))
    assert documents(corpus) == [[5, 69_999, 65_536]]
    assert (corpus.vocabulary, corpus.end_token) == (70_001, 70_000)
    assert corpus.manifest.files["tokens.bin"].num_bytes == 4 * 4


def characters_of_tokens(tokenizer_file: Path, text: str) -> list[set[int]]:
    """For every token the characters it holds bytes of: in a byte-level BPE an entry has one letter per byte."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    owner = [number for number, character in enumerate(text) for _ in character.encode()]
    sizes = [len(tokenizer.id_to_token(token) or "") for token in tokenizer.encode(text).ids]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [set(owner[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


@pytest.mark.parametrize("text", TEXTS)
def test_masks_agree_with_character_spans(prepare_records: PrepareRecords, tokenizer_file: Path, text: str) -> None:
    size = len(text)
    third, half = size // 3, size // 2
    cases = [[[0, size]], [[third, half]], [[0, 1], [size - 1, size]], [], [[half, half]], [[0, half]]]
    corpus = prepare_records([{"text": text, "loss_spans": spans} for spans in cases])
    holds = characters_of_tokens(tokenizer_file, text)
    for document, spans in enumerate(cases):
        counted = {character for start, end in spans for character in range(start, end)}
        expected = [bool(characters & counted) for characters in holds] + [size - 1 in counted]
        # the first token is never a target
        assert corpus.read(document, 0, corpus.length(document))[2].tolist() == expected[1:]


def test_records_without_spans_count_whole_next_to_masked_ones(prepare_records: PrepareRecords) -> None:
    corpus = prepare_records(
        [{"text": "one two"}, {"text": "one two", "loss_spans": []}, {"text": "x", "loss_spans": None}]
    )
    counts = [corpus.read(document, 0, corpus.length(document))[2] for document in range(3)]
    assert [bool(count.all()) for count in counts] == [True, False, True]
    assert not counts[1].any()


def test_only_what_assistants_say_counts(prepare_records: PrepareRecords, tokenizer_file: Path) -> None:
    said = [("user", "Where to?"), ("assistant", "North, at dawn 🚣"), ("user", "Why?"), ("assistant", "The wind.")]
    corpus = prepare_records([{"messages": [{"role": role, "content": content} for role, content in said]}])
    inputs, targets, counts = corpus.read(0, 0, corpus.length(0))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    whole = "<|user|>\nWhere to?\n<|assistant|>\nNorth, at dawn 🚣\n<|user|>\nWhy?\n<|assistant|>\nThe wind."
    assert tokenizer.decode(inputs.tolist()) == whole
    assert tokenizer.decode(targets[counts][:-1].tolist()) == "North, at dawn 🚣The wind."
    assert counts[-1]  # after the last answer the end is learnt


def test_a_conversation_that_ends_with_a_question_does_not_teach_its_end(prepare_records: PrepareRecords) -> None:
    messages = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    corpus = prepare_records([{"messages": messages}])
    assert not corpus.read(0, 0, corpus.length(0))[2][-1]


def test_parquet_holds_spans_and_messages(
    tmp_path: Path, tokenizer_file: Path, prepare_records: PrepareRecords
) -> None:
    records: list[dict[str, Any]] = [
        {"text": "one two three", "loss_spans": [[4, 7]], "messages": None},
        {"text": None, "loss_spans": None, "messages": [{"role": "assistant", "content": "four"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    parquet = prepare([tmp_path / "a.parquet"], tmp_path / "parquet", TokenizerFile(tokenizer_file))
    assert parquet.digest == prepare_records(records).digest


def test_fields_can_be_named(tmp_path: Path, tokenizer_file: Path, prepare_records: PrepareRecords) -> None:
    path = write_jsonl(tmp_path / "named.jsonl", [{"body": "one two", "keep": [[0, 3]]}])
    fields = RecordFields(text="body", loss_spans="keep")
    corpus = prepare([path], tmp_path / "named", TokenizerFile(tokenizer_file), fields)
    assert corpus.digest == prepare_records([{"text": "one two", "loss_spans": [[0, 3]]}]).digest


def test_binary_files_are_skipped_and_counted(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    (folder / "program").write_bytes(b"\x7fELF\0\0")
    (folder / "wide.txt").write_bytes("text".encode("utf-16"))
    (folder / "table.jsonl").write_bytes(b"\0{}")
    corpus = prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file))
    assert documents(corpus) == encoded(tokenizer_file, TEXTS)
    assert corpus.manifest.skipped.binary_files == 3


def test_bytes_that_are_not_utf8_become_replacement_characters(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "caf\\ud800", "loss_spans": [[0, 4]]}\n')
    corpus = prepare([tmp_path / "latin.txt", tmp_path / "latin.jsonl"], tmp_path / "c", TokenizerFile(tokenizer_file))
    assert documents(corpus) == encoded(tokenizer_file, ["caf\ufffd"] * 3)


def test_a_byte_order_mark_is_not_text(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfone")
    corpus = prepare([tmp_path / "bom.txt"], tmp_path / "corpus", TokenizerFile(tokenizer_file))
    assert documents(corpus) == encoded(tokenizer_file, ["one"])


def test_file_names_need_not_be_utf8(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = write_texts(tmp_path / "texts", ["one"])
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("two")
    assert len(prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file))) == 2


def test_inputs_without_any_document_are_refused_with_the_numbers(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = write_texts(tmp_path / "texts", ["", "\0", ""])
    for tokenizer in (TokenizerFile(tokenizer_file), TrainBpe(300)):
        with pytest.raises(CorpusEmpty, match="3 input files hold no document: 1 binary files, 2 empty documents"):
            prepare([folder], tmp_path / "corpus", tokenizer)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CorpusEmpty, match="0 input files"):
        prepare([tmp_path / "nothing"], tmp_path / "corpus", TrainBpe(300))
    assert not list(tmp_path.glob("corpus*/"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "record 2: not JSON"),
        ("[1]", "record 2: a record is an object, this is a list"),
        ('{"body": "x"}', r"record 2: field 'text' is not among \['body'\]"),
        ('{"text": 3}', "record 2: field 'text' is a int"),
        ('{"text": "abc", "loss_spans": [[1, 4]]}', r"loss span \[1, 4\] .* <= 3"),
        ('{"text": "abc", "loss_spans": [[2, 1]]}', r"loss span \[2, 1\]"),
        ('{"text": "abc", "loss_spans": "all"}', "loss spans are a list"),
        ('{"messages": [{"role": "user"}]}', "a message is"),
        ('{"messages": "hello"}', "messages are a list"),
    ],
)
def test_a_record_of_the_wrong_form_is_named_or_skipped(
    tmp_path: Path, tokenizer_file: Path, record: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{record}\n\n{{"text": "two"}}\n')
    with pytest.raises(DocumentInvalid, match=message):
        prepare([path], tmp_path / "corpus", TokenizerFile(tokenizer_file))
    skipping = RecordFields(skip_invalid=True)
    corpus = prepare([path], tmp_path / "corpus", TokenizerFile(tokenizer_file), skipping)
    assert documents(corpus) == encoded(tokenizer_file, ["one", "two"])
    assert corpus.manifest.skipped.invalid_records == 1


def test_damaged_gzip_and_parquet_files_are_named(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(4000).hex().encode())[:2000])
    (tmp_path / "not.jsonl.gz").write_bytes(b'{"text": "x"}')
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for name in ("cut.jsonl.gz", "not.jsonl.gz", "cut.parquet"):
        with pytest.raises(DocumentInvalid, match=f"{name} is not a complete"):
            prepare([tmp_path / name], tmp_path / "corpus", TokenizerFile(tokenizer_file))


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ExtraMissing, match=r"pip install 'evermesh\[parquet\]'"):
        prepare([tmp_path / "a.parquet"], tmp_path / "corpus", TokenizerFile(tokenizer_file))


def test_directories_are_walked_sorted_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a.txt", ".git/config", "a/.hidden", "c/d/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in find_inputs([tmp_path])] == ["a.txt", "a/z.txt", "b.txt", "c/d/e.txt"]


def test_a_missing_input_or_tokenizer_is_named(tmp_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(InputNotFound, match="nowhere"):
        prepare([tmp_path / "nowhere"], tmp_path / "corpus", TokenizerFile(tokenizer_file))
    with pytest.raises(InputNotFound, match=r"tokenizer .*nowhere"):
        prepare([write_texts(tmp_path / "texts")], tmp_path / "corpus", TokenizerFile(tmp_path / "nowhere"))


def test_unusable_tokenizers_are_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    (tmp_path / "not.json").write_text("{}")
    with pytest.raises(TokenizerInvalid, match="not a Hugging Face"):
        prepare([folder], tmp_path / "corpus", TokenizerFile(tmp_path / "not.json"))
    with pytest.raises(TokenizerInvalid, match="'</fin>'"):
        prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file, end_token="</fin>"))
    with pytest.raises(TokenizerInvalid, match="at least 257"):
        TrainBpe(256)


def test_an_existing_output_is_left_alone(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    before = content(prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file)).path)
    with pytest.raises(CorpusExists):
        prepare([folder], tmp_path / "corpus", TrainBpe(300))
    assert content(tmp_path / "corpus") == before


def test_nothing_but_the_corpus_stays(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    prepare([folder], tmp_path / "out" / "corpus", TrainBpe(300))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["corpus"]


def test_a_preparation_in_progress_is_not_disturbed(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    with exclusive(tmp_path / "corpus.lock", wait_s=0), pytest.raises(CorpusBusy, match="for 0 s"):
        prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file))
    prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file))


@pytest.mark.parametrize("full_from", [0, 1, 2, 5, 9, 16, 18, 20])
def test_a_full_disk_is_named_leaves_no_corpus_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_from: int
) -> None:
    folder = write_texts(tmp_path / "texts")
    created: list[Path] = []
    create = files.create

    def full(path: Path) -> Any:
        created.append(path)
        return create(path if len(created) <= full_from else Path("/dev/full"))

    monkeypatch.setattr(files, "create", full)
    with pytest.raises(DiskFull, match=r"is full .* run it again"):
        prepare([folder], tmp_path / "corpus", TrainBpe(300))
    assert not (tmp_path / "corpus").exists()
    monkeypatch.undo()
    resumed = prepare([folder], tmp_path / "corpus", TrainBpe(300))
    (tmp_path / "clean").mkdir()
    assert content(resumed.path) == content(prepare([folder], tmp_path / "clean" / "corpus", TrainBpe(300)).path)


def test_parts_are_made_again_when_their_input_or_the_settings_changed(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    done: list[str] = []

    def interrupt(number: int, total: int, name: str) -> None:
        assert total == 5
        done.append(name)
        if number == 4:
            raise KeyboardInterrupt

    def run(fields: RecordFields | None = None) -> list[str]:
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file), fields, progress=interrupt)
        return list(done)

    assert run() == ["0.txt", "1.txt", "2.txt", "3.txt"]
    (folder / "1.txt").write_text("other")
    (folder / "3.txt").write_text("text")
    assert run() == ["1.txt", "3.txt"]
    assert run(RecordFields(text="body")) == ["0.txt", "1.txt", "2.txt", "3.txt"]
    corpus = prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file))
    assert documents(corpus) == encoded(tokenizer_file, [TEXTS[0], "other", TEXTS[2], "text", TEXTS[4]])


def test_a_damaged_part_is_made_again(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = write_texts(tmp_path / "texts")

    def interrupt(number: int, _: int, __: str) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file), progress=interrupt)
    for part in (tmp_path / "corpus.partial" / "parts").glob("*/tokens.bin"):
        part.write_bytes(bytes(part.stat().st_size))
    corpus = prepare([folder], tmp_path / "corpus", TokenizerFile(tokenizer_file))
    assert documents(corpus) == encoded(tokenizer_file, TEXTS)

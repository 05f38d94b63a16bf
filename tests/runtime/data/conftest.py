"""Small tokenizers and corpora."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from evermesh.runtime.data import Corpus, TokenizerFile, prepare
from evermesh.runtime.data.tokenizer import train_bpe

TEXTS = [
    "The mesh sails on, every rank in its place.\n",
    "def reshard(held, wanted):\n    return [box for box in wanted if box not in held]\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 🚣 漢字",
    "a",
    "one two three four five six seven eight nine ten " * 20,
]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 entries."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_bpe(TEXTS, 400))
    return path


@pytest.fixture
def prepare_records(tmp_path: Path, tokenizer_file: Path) -> Callable[[Sequence[dict[str, Any]]], Corpus]:
    """Makes a corpus of JSON records."""

    def run(records: Sequence[dict[str, Any]]) -> Corpus:
        number = len(list(tmp_path.glob("records*.jsonl")))
        path = tmp_path / f"records{number}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return prepare([path], tmp_path / f"corpus{number}", TokenizerFile(tokenizer_file))

    return run

"""A second writer of the corpus format, from its description in the README, to check the reader against."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from evermesh.runtime.data import Corpus

VOCABULARY, END = 1000, 999


def write_corpus(path: Path, lengths: Sequence[int], *, tokenizer: str = "t", seed: int = 0) -> Corpus:
    """A corpus of random tokens whose documents have ``lengths`` tokens."""
    path.mkdir(parents=True)
    random = np.random.default_rng(seed)
    documents = [[*random.integers(0, END, length).tolist(), END] for length in lengths]
    np.array([token for document in documents for token in document], dtype="<u2").tofile(path / "tokens.bin")
    np.save(path / "index.npy", np.cumsum([0, *map(len, documents)]).astype(np.int64))
    (path / "tokenizer.json").write_text("{}")
    (path / "files.json").write_text(json.dumps([["all.jsonl", len(documents)]]))
    write_manifest(path, documents=len(documents), tokenizer=tokenizer)
    return Corpus.open(path)


def write_manifest(path: Path, *, documents: int, tokenizer: str = "t") -> None:
    """Write ``corpus.json`` for the files that are there."""
    blocks = {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.name != "corpus.json"}
    manifest = {
        "format_version": 1,
        "name": path.name,
        "documents": documents,
        "stored_tokens": len(blocks["tokens.bin"]) // 2,
        "vocabulary": VOCABULARY,
        "end_token": END,
        "tokenizer_digest": tokenizer,
        "files": {
            name: {"num_bytes": len(block), "xxh3_64": xxhash.xxh3_64_hexdigest(block)}
            for name, block in blocks.items()
        },
        "skipped": {"binary_files": 0, "empty_documents": 0, "invalid_records": 0},
    }
    (path / "corpus.json").write_text(json.dumps(manifest))

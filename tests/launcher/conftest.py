"""A small corpus and a job on it that takes a second."""

from pathlib import Path

import pytest
import yaml

from evermesh.runtime.data import TrainBpe, prepare

WORDS = "the ring passes keys and values while every rank keeps its own queries and waits for nobody else at all"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 documents of 10 to 600 words."""
    folder = tmp_path_factory.mktemp("texts")
    words = WORDS.split()
    for number in range(60):
        length = 10 + 590 * (number % 10 == 0) + 9 * number % 97
        (folder / f"{number}.txt").write_text(" ".join(words[(number + i * i) % len(words)] for i in range(length)))
    output = tmp_path_factory.mktemp("corpora") / "words"
    prepare([folder], output, TrainBpe(300))
    return output


@pytest.fixture
def job_file(corpus: Path, tmp_path: Path) -> Path:
    """A job of 6 steps on 2 workers."""
    return write_job(corpus, tmp_path)


@pytest.fixture(scope="module")
def job_file_of_module(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job in a folder of its own, for runs that several tests look at."""
    return write_job(corpus, tmp_path_factory.mktemp("job"))


def write_job(corpus: Path, folder: Path) -> Path:
    """A job of 6 steps on 2 workers, its runs in ``folder``."""
    values = {
        "name": "small",
        "runs": str(folder / "runs"),
        "workers": 2,
        "train": {
            "steps": 6,
            "model": {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32},
            "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 256, "batch_tokens": 1024},
            "layout": {"capacity": 160},
            "checkpoint": {"every": 2},
            "timeout_s": 60,
        },
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path

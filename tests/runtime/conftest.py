"""A small corpus with a long tail of lengths, for everything that trains."""

from pathlib import Path

import numpy as np
import pytest

from evermesh.runtime.data import TrainBpe, prepare


def make_corpus(folder: Path, vocabulary: int = 400) -> Path:
    """A corpus of 120 made-up documents, from one word to some 900 tokens."""
    texts = folder / "texts"
    texts.mkdir()
    random = np.random.default_rng(5)
    words = ["".join(random.choice(list("abcdefgh"), size=random.integers(1, 7))) for _ in range(300)]
    for number in range(120):
        count = min(900, max(1, int(random.lognormal(4.0, 1.3))))
        (texts / f"{number:03}.txt").write_text(" ".join(random.choice(words, size=count)))
    prepare([texts], folder / "corpus", TrainBpe(vocabulary))
    return folder / "corpus"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus of this room's tests."""
    return make_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def odd_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts with a vocabulary that neither two nor four ranks divide."""
    return make_corpus(tmp_path_factory.mktemp("odd"), 397)

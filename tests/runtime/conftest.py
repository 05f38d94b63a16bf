"""A small corpus with a long tail of lengths, for everything that trains."""

from pathlib import Path

import numpy as np
import pytest

from evermesh.runtime.data import TrainBpe, prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 120 made-up documents, from one word to some 900 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(5)
    words = ["".join(random.choice(list("abcdefgh"), size=random.integers(1, 7))) for _ in range(300)]
    for number in range(120):
        count = min(900, max(1, int(random.lognormal(4.0, 1.3))))
        (folder / f"{number:03}.txt").write_text(" ".join(random.choice(words, size=count)))
    output = folder.parent / f"{folder.name}-corpus"
    prepare([folder], output, TrainBpe(400))
    return output

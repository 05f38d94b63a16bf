"""How far a run that is stopped and resumed on other numbers of workers is from the uninterrupted one, in float64."""

import tempfile
from pathlib import Path

from tests.benchmarks.harness import Row, exact_row
from tests.runtime.conftest import make_corpus
from tests.runtime.test_trainer import largest_difference, small_config, train_on


def run() -> list[Row]:
    """The largest difference of any parameter after 8 steps, stopped after 5 on 4 workers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder)
        config = small_config(corpus)
        uninterrupted = train_on(4, config, folder / "uninterrupted")
        rows = []
        for workers in (4, 3, 5, 1):
            layout = {"capacity": 600 if workers == 1 else 200}
            directory = folder / f"on-{workers}"
            train_on(4, small_config(corpus, stop_at=5), directory)
            resumed = train_on(workers, config | {"layout": layout}, directory, resume=True)
            what = f"largest difference of a parameter, resumed on {workers} workers"
            goal = 0.0 if workers == 4 else 1e-9
            rows.append(exact_row(what, largest_difference(resumed, uninterrupted), "absolute", goal=goal))
    return rows

"""A browser, and a job to look at with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from evermesh.launcher import Run
from evermesh.launcher.planning import Degrees, read_case
from tests.launcher.dashboard.browser import CHROMIUM, Page, browser, new_page
from tests.launcher.dashboard.recording import STEPS, Recorded, recorded, train


@pytest.fixture(scope="session")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A job on 4 workers, one of which was killed after a checkpoint: steps were trained again."""
    return train(corpus, tmp_path_factory.mktemp("recorded"), steps=STEPS)


@pytest.fixture
def told(run: Run) -> Recorded:
    planned = read_case(run.directory / "job.yaml", Degrees(), batch=STEPS)
    return recorded(run.directory, planned.plan, planned.timeline())


@pytest.fixture(scope="session")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium (Debian), or any other way to put it into PATH")
    with browser(tmp_path_factory.mktemp("profile")) as address:
        yield address


@pytest.fixture
def page(devtools: str) -> Iterator[Page]:
    with new_page(devtools) as page:
        yield page

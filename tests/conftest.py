"""What holds for all tests: in continuous integration an unexpected skip is a failure."""

import os
import shutil
import tempfile
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

_EXPECTED_SKIPS = ("not permitted here (unshare",)
"""Parts of reasons with which a test may be skipped in continuous integration: what the kernel forbids."""


_PATIENT = frozenset(
    f"tests/launcher/test_{name}.py"
    for name in ("hugging_face", "prometheus", "queueing", "ranking", "ray", "slurm", "topology")
)
"""Tests of whole jobs that do not look at how soon anything is noticed: either process may have them, beside any others."""

_STORES = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Jobs of tests know nothing of nodes of other jobs, and tell nobody of theirs."""
    config.stash[_STORES] = tempfile.mkdtemp(prefix="evermesh-cluster-")
    os.environ["EVERMESH_CLUSTER"] = config.stash[_STORES]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "_Shares":
    """Where two processes share the tests, this is how."""
    return _Shares(config, log)


class _Shares(LoadFileScheduling):  # type: ignore[misc]
    """One process has the tests of whole jobs, which mostly wait and look at how soon something is noticed, one after
    another; they begin first. The other has all else, file by file."""

    def _split_scope(self, nodeid: str) -> str:
        return "jobs" if _is_of_jobs(nodeid) else str(super()._split_scope(nodeid))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those of whole jobs begin first where two processes share the tests."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not _is_of_jobs(item.nodeid))


def _is_of_jobs(nodeid: str) -> bool:
    return nodeid.startswith("tests/launcher/test_") and nodeid.partition("::")[0] not in _PATIENT


def pytest_unconfigure(config: pytest.Config) -> None:
    """Nothing is left of it."""
    shutil.rmtree(config.stash[_STORES], ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name unexpected skips."""
    for reason in _unexpected_skips(terminalreporter):
        terminalreporter.write_line(f"unexpected skip: {reason}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if continuous integration skipped what it should have run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    unexpected = _unexpected_skips(reporter) if isinstance(reporter, pytest.TerminalReporter) else []
    if os.environ.get("CI") == "true" and unexpected and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unexpected_skips(reporter: pytest.TerminalReporter) -> list[str]:
    reasons = [str(report.longrepr) for report in reporter.stats.get("skipped", [])]
    return [reason for reason in reasons if not any(expected in reason for expected in _EXPECTED_SKIPS)]

"""What holds for all tests: in continuous integration an unexpected skip is a failure."""

import os

import pytest

_EXPECTED_SKIPS = ("not permitted here (unshare",)
"""Parts of reasons with which a test may be skipped in continuous integration: what the kernel forbids."""


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests run in several processes, those of the launcher share one: they start jobs and wait for them, and two
    of them at a time would wait for each other. Of the others, those of a file stay together."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        parts = item.path.relative_to(config.rootpath).parts
        item.add_marker(pytest.mark.xdist_group("launcher" if parts[:2] == ("tests", "launcher") else "/".join(parts)))
    # a process keeps its last test, and the job that this one watches, until the other process has finished everything
    items.sort(key=lambda item: item.path.name != "test_watching.py")


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

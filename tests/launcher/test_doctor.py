"""`evermesh doctor` on this machine."""

import json
import os
from pathlib import Path

import pytest

from tests.launcher.test_cli import evermesh


def test_the_doctor_tells_which_tap_records_and_what_it_costs() -> None:
    done = evermesh("doctor", "--json")
    found = json.loads(done.stdout)
    states = [check["state"] for check in found]
    assert done.returncode == max({"ok": 0, "warn": 1, "bad": 2}[state] for state in states), done.stderr
    checks = {(check["section"], check["check"]): check for check in found}
    assert checks["recorder", "room for rings"]["state"] == "ok"
    tap = checks["recorder", "tap"]
    assert tap["state"] == "ok", tap
    assert "adds" in tap["reason"]
    assert "us to a collective" in tap["reason"]
    tests = {check for section, check in checks if section == "tests"}
    assert {"arithmetic on cpu", "memory test", "loopback", "collectives"} <= tests
    assert all(checks["tests", name]["state"] == "ok" for name in ("arithmetic on cpu", "memory test", "collectives"))
    assert "bad" not in states


def test_a_quick_look_is_a_table_of_host_and_gpus_and_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = evermesh("doctor", "--quick")
    assert done.returncode in (0, 1), done.stdout
    assert "memory" in done.stdout
    assert "GPUs" in done.stdout
    assert "arithmetic" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_the_doctor_names_the_way_out_and_nothing_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    done = evermesh("doctor", "--json")
    assert done.returncode == 1, done.stderr
    [tap] = [check for check in json.loads(done.stdout) if check["check"] == "tap"]
    assert tap["state"] == "warn"
    assert "install g++" in tap["way_out"]
    assert list((tmp_path / "evermesh").rglob("*.so")) == []
    assert os.environ["PATH"] == str(tmp_path)

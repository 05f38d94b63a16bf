"""`evermesh doctor` on this machine."""

import json
import os
from pathlib import Path

import pytest

from evermesh.launcher.doctor.check import Check, exit_code
from tests.launcher.test_cli import evermesh


def test_the_doctor_tells_which_tap_records_and_what_it_costs() -> None:
    done = evermesh("doctor", "--json")
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["shared memory"]["state"] == "good"
    assert checks["tap"]["state"] == "good", checks["tap"]
    assert "adds" in checks["tap"]["fact"]
    assert "us to a collective" in checks["tap"]["fact"]


def test_without_a_compiler_the_doctor_names_the_way_out_and_nothing_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    done = evermesh("doctor")
    assert done.returncode == 0, done.stderr
    assert "worse" in done.stdout
    assert "install g++" in done.stdout
    assert list((tmp_path / "evermesh").rglob("*.so")) == []
    assert os.environ["PATH"] == str(tmp_path)


def test_only_what_is_bad_fails() -> None:
    good, worse, bad = (Check("a", "b", state, "c") for state in ("good", "worse", "bad"))
    assert exit_code([good, worse]) == 0
    assert exit_code([good, bad]) == 1

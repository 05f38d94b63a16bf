"""Building the native tap: once, safely, and never so that its absence costs more than the better tap."""

import json
import multiprocessing
import os
import stat
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from evermesh.fault.recorder.errors import TapUnusable
from evermesh.fault.recorder.native import building
from evermesh.fault.recorder.native.building import build_tap, cache_folder, find_tap, is_settled, torch_version
from tests.cluster import run_ranks
from tests.fault.recorder.recording import recording, rings

_CONTEXT = multiprocessing.get_context("forkserver")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forkserver.ensure_running()  # else ranks of later tests would find this environment
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def _tier_without_tap(rank: int, world_size: int, cache: str, folder: str) -> tuple[str, str]:
    os.environ["XDG_CACHE_HOME"] = cache
    with recording(Path(folder), rank, world_size, "auto") as recorder:
        return recorder.chosen.tier, recorder.chosen.because


def test_without_a_native_tap_python_records_and_says_why(empty_cache: Path) -> None:
    with rings() as folder:
        ((tier, because),) = run_ranks(1, _tier_without_tap, str(empty_cache), str(folder))
    assert tier == "python"
    assert "evermesh doctor" in because


def test_without_a_compiler_nothing_is_built_and_nothing_settled(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(TapUnusable, match=r"no C\+\+ compiler .* Install g\+\+, or set CXX"):
        build_tap()
    assert not is_settled(torch.__version__)


def _compiler(folder: Path) -> Path:
    """One that takes its time and fails, and says how often it was asked."""
    compiler = folder / "compiler"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "compiler 1.0" && exit\n'
        f'echo asked >> {folder}/asked\nsleep 1\necho "tap.cpp:1: error: no" >&2\nexit 1\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return compiler


def _build(cache: str, compiler: str, results: "multiprocessing.Queue[str]") -> None:
    os.environ["XDG_CACHE_HOME"], os.environ["CXX"] = cache, compiler
    results.put(build_tap().refused)


def test_of_two_builders_at_a_time_one_builds_and_a_failure_is_not_tried_again(empty_cache: Path) -> None:
    results: multiprocessing.Queue[str] = _CONTEXT.Queue()
    arguments = (str(empty_cache), str(_compiler(empty_cache)), results)
    builders = [_CONTEXT.Process(target=_build, args=arguments) for _ in range(2)]
    for builder in builders:
        builder.start()
    said = [results.get(timeout=60) for _ in builders]
    for builder in builders:
        builder.join(60)
    assert all("cannot build the tap" in text and "error: no" in text for text in said)
    assert (empty_cache / "asked").read_text() == "asked\n"
    with pytest.raises(TapUnusable, match="cannot build the tap"):
        find_tap(torch.__version__)
    assert is_settled(torch.__version__)
    assert not list(cache_folder().glob(".building-*"))


def test_a_tap_of_another_torch_or_source_is_not_found(
    native_tap: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = native_tap.stem, cache_folder()
    told = {"library": str(native_tap), "torch": torch.__version__, "compiler": "", "refused": ""}
    (folder / f"{name}.json").write_text(json.dumps(told))
    assert find_tap(torch.__version__) == native_tap
    with pytest.raises(TapUnusable, match=r"none was built for torch 2\.99\.0"):
        find_tap("2.99.0")
    monkeypatch.setattr(building, "defines", lambda: {"NUM_SLOTS": 1})
    with pytest.raises(TapUnusable, match="none was built"):
        find_tap(torch.__version__)


def test_a_library_that_is_no_tap_fails_its_self_test(empty_cache: Path) -> None:
    library = empty_cache / "tap.so"
    library.write_bytes(b"no library")
    assert "self-test of the native tap failed" in building._test(library)


def test_a_cache_that_others_may_write_is_refused(empty_cache: Path) -> None:
    cache_folder().chmod(0o777)
    with pytest.raises(TapUnusable, match=r"chmod 700"):
        cache_folder()


def test_the_version_of_torch_is_known_without_importing_it() -> None:
    assert torch_version() == torch.__version__

"""A conversion that is killed at any call that changes the disk: its target is not there, or all of it is."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from evermesh.checkpoint import Box, Shard, ShardMap, TensorShards, latest, open_checkpoint, save, verify
from evermesh.checkpoint.converting import Conversion, convert
from evermesh.checkpoint.formats import Format
from tests.checkpoint.killing import Calls, Kill

TARGETS: tuple[Format, ...] = ("evermesh", "safetensors", "deepspeed-zero1")
OF_MANY_FILES: tuple[Format, ...] = ("torch-distributed", "deepspeed-universal")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two weights and their moments."""
    shapes = {"one": (30, 20), "two": (7,)}
    tensors = {
        f"{kind}.{name}": torch.randn(shape)
        for kind in ("parameter", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }
    shards = {
        name: TensorShards("float32", tuple(t.shape), (Shard(Box((0,) * t.dim(), tuple(t.shape)), (0,)),))
        for name, t in tensors.items()
    }
    groups: Any = [{"names": list(shapes), "settings": {"lr": 0.1, "betas": [0.9, 0.99]}, "numbers": {"step": 3}}]
    path = save(tmp_path_factory.mktemp("saved"), 3, ShardMap(shards), tensors, {"groups": groups})
    assert isinstance(path, Path)
    return path


def _convert(saved: Path, directory: Path, to: Format) -> None:
    convert(open_checkpoint(saved), directory, Conversion(to=to))


def _content(directory: Path) -> dict[str, bytes]:
    """All files but those that tell when they were written, and whose checksums ``verify`` looks at."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name not in ("manifest.json", "latest"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def _killed(saved: Path, directory: Path, to: Format, kill: Kill) -> bool:
    """Convert in a process of its own that dies at a call; whether it did."""
    process = os.fork()
    if process == 0:
        try:
            Calls(kill).install()
            _convert(saved, directory, to)
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _is_there(directory: Path, whole: dict[str, bytes], to: Format) -> bool:
    """Whether the target is; nothing of it may be there unless all of it is."""
    if to == "evermesh":
        path = latest(directory)
        if path is None:
            return False
        assert verify(path).ok
        assert {f"{path.name}/{name}": content for name, content in _content(path).items()} == whole
        return True
    if not directory.exists():
        return False
    assert _content(directory) == whole
    return True


@pytest.mark.parametrize("to", [*TARGETS, *(pytest.param(to, marks=pytest.mark.parity) for to in OF_MANY_FILES)])
def test_a_conversion_killed_at_any_call_leaves_nothing_or_all_and_the_next_one_reclaims_its_space(
    to: Format, saved: Path, tmp_path: Path
) -> None:
    _convert(saved, tmp_path / "whole" / "target", to)
    whole = _content(tmp_path / "whole" / "target")
    found, call = [], 0
    while True:
        parent = tmp_path / "killed"
        shutil.rmtree(parent, ignore_errors=True)
        if not _killed(saved, parent / "target", to, Kill(call, half=True)):
            break
        found.append(_is_there(parent / "target", whole, to))
        if not found[-1] or to == "evermesh":  # which replaces a step
            _convert(saved, parent / "target", to)
            assert _content(parent / "target") == whole
            assert [entry.name for entry in parent.iterdir()] == ["target"]
        call += 1
    assert len(found) > 10
    assert found == sorted(found)
    assert not found[0]
    assert found[-1] or to != "evermesh"

"""Checkpoints that Megatron Core itself wrote. Those in ``data`` are of versions 0.13.1 and 0.16.1."""

import importlib.util
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.regions import Box, Interval
from tests.checkpoint.foreign_loads import assert_loads_into_any_layout, load_whole
from tests.checkpoint.megatron_saves import RANKS, flattened, save_megatron, whole
from tests.cluster import run_ranks

_DATA = Path(__file__).parent / "data"
VERSIONS = ("0.13.1", "0.16.1")


def unpacked(version: str, folder: Path) -> Path:
    """What a version of the library wrote."""
    with zipfile.ZipFile(_DATA / f"megatron-core-{version}.zip") as archive:
        archive.extractall(folder)
    return folder


def _check(folder: Path, expected: dict[str, Tensor]) -> None:
    source = open_checkpoint(folder)
    assert (source.kind, source.step, source.left_out) == ("megatron", 5, ())
    found = load_whole(source)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert source.objects["common"] == {
        "iteration": 5,
        "args": {"tensor_model_parallel_size": 2},
        "checkpoint_version": 3.0,
    }
    assert source.objects["model.extra/shard_1_2"] == [{"rank": 1}]
    for ranks in (1, 3):
        assert_loads_into_any_layout(source, found, ranks)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensor_is_what_was_saved_in_any_layout(version: str, tmp_path: Path) -> None:
    _check(unpacked(version, tmp_path), whole() | (flattened() if version == "0.13.1" else {}))


def test_flattened_ranges_of_boxes_become_regions_of_the_tensor(tmp_path: Path) -> None:
    source = open_checkpoint(unpacked("0.13.1", tmp_path))
    regions = [extent.region for extent in source.tensors["optimizer.columns"].extents]
    assert source.tensors["optimizer.columns"].shape == (8, 6)
    assert Box((0, 0), (4, 3)) in regions  # 13 of the 24 elements of the left half: four rows and one element
    assert Box((4, 0), (1, 1)) in regions
    assert all(isinstance(e.region, Interval) for e in source.tensors["optimizer.rows"].extents)


def test_saves_that_are_not_complete_or_of_another_backend_are_refused(tmp_path: Path) -> None:
    path = unpacked("0.16.1", tmp_path) / "iter_0000005"
    said = path / "metadata.json"
    complete = said.read_text()
    for text, reason in (
        (json.dumps(json.loads(complete) | {"sharded_backend": "zarr"}), "its backend is 'zarr'"),
        ("{}", "names no backend"),
        ("[" * 100_000, "names no backend"),
    ):
        said.write_text(text)
        with pytest.raises(ForeignUnusable, match=reason):
            open_checkpoint(path)
    said.unlink()
    with pytest.raises(ForeignUnusable, match=r"no metadata\.json, which is written last"):
        open_checkpoint(path)


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="the extra bench is missing")
def test_the_library_reads_the_same_from_what_it_writes_here(tmp_path: Path) -> None:
    its_own = run_ranks(RANKS, save_megatron, str(tmp_path / "saved"), timeout_s=170.0)
    expected = whole()
    _check(tmp_path / "saved", expected)
    loaded = {name: tensor for name, tensor in its_own[0].items() if isinstance(tensor, Tensor)}  # beside common values
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert torch.equal(expected[name], tensor), name
    shutil.rmtree(tmp_path / "saved")

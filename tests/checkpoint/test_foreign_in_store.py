"""Checkpoints of other projects in an object store: read where they lie, as from a folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from evermesh.checkpoint import (
    Box,
    CheckpointNotFound,
    ForeignUnusable,
    Interval,
    Shard,
    ShardMap,
    StoreUnusable,
    TensorShards,
    load,
    open_checkpoint,
    save,
    verify,
)
from evermesh.checkpoint.comparing import diff
from evermesh.checkpoint.converting import Conversion, convert
from evermesh.checkpoint.formats import Format
from evermesh.checkpoint.huggingface import read_weights
from evermesh.checkpoint.naming import ForeignPart, Naming
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.places import ObjectPath
from evermesh.checkpoint.stores.store import objects_of
from tests.checkpoint.fault_proxy import Weather
from tests.checkpoint.foreign_loads import load_whole
from tests.checkpoint.object_store import TestStore
from tests.checkpoint.test_fuzz import FORMATS


def _deepspeed(to: Format, folder: Path) -> Path:
    """Written by our own writers, which the library itself judges elsewhere (``test_converting``)."""
    kinds, names = ("parameter", "exp_avg", "exp_avg_sq"), ("a", "b")
    tensors = {f"{kind}.{name}": torch.randn(30, 40) for kind in kinds for name in names}
    shards = {name: TensorShards("float32", (30, 40), (Shard(Interval(0, 1200), (0,)),)) for name in tensors}
    groups = [{"names": list(names), "settings": {"lr": 0.1}, "numbers": {"step": 5.0}}]
    source = open_checkpoint(save(folder / "ours", 5, ShardMap(shards), tensors, cast(Any, {"groups": groups})))
    convert(source, folder / "theirs", Conversion(to, 1 if to == "deepspeed-universal" else 2))
    return folder / "theirs"


CASES: dict[str, Callable[[Path], Path]] = {
    **{name: FORMATS[name] for name in ("hugging face", "torch", "sharded", "megatron")},
    "zero 1": partial(_deepspeed, "deepspeed-zero1"),
    "zero 3": partial(_deepspeed, "deepspeed-zero3"),
    "universal": partial(_deepspeed, "deepspeed-universal"),
}


def _upload(here: Path, store: TestStore) -> ObjectPath:
    there = store.place()
    for file in sorted(path for path in here.rglob("*") if path.is_file()):
        objects_of(there).put(there / file.relative_to(here).as_posix(), file.read_bytes())
    return there


def _named(source: Source) -> tuple[Any, ...]:
    """All that an index says, but where it is."""
    return source.kind, source.tensors, source.objects, source.description, source.step, source.left_out


@pytest.mark.parametrize("name", CASES)
def test_every_format_is_read_from_a_store_as_from_a_folder(name: str, store: TestStore, tmp_path: Path) -> None:
    here = CASES[name](tmp_path)
    there = _upload(here, store)
    one, other = open_checkpoint(here), open_checkpoint(there)
    assert _named(one) == _named(other)
    assert one.kind == other.kind
    found, expected = load_whole(other), load_whole(one)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert diff(one, other).same
    report, local = verify(there), verify(here)
    assert (report.ok, report.bytes_read, report.has_checksums) == (True, local.bytes_read, local.has_checksums)


def test_a_pointer_in_a_store_is_followed_and_one_that_leads_out_is_refused(store: TestStore, tmp_path: Path) -> None:
    there = _upload(FORMATS["megatron"](tmp_path).parent, store)
    assert open_checkpoint(there).step == 5
    objects_of(there).put(there / "latest_checkpointed_iteration.txt", b"../other")
    with pytest.raises(ForeignUnusable, match="no folder beside it"):
        open_checkpoint(there)
    with pytest.raises(CheckpointNotFound, match=r"it has no manifest\.json, and is no checkpoint of DeepSpeed"):
        open_checkpoint(store.place())


def test_only_what_is_wanted_is_fetched(store: TestStore, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    from safetensors.torch import save_file

    weights = torch.randn(2048, 1024)
    save_file({"model.w": weights, "model.rest": torch.randn(2048, 1024)}, folder / "model.safetensors")
    there = _upload(folder, store)
    part: dict[str, tuple[ForeignPart, ...]] = {"w": (ForeignPart("model.w", 0, Box((0, 0), (2048, 1024))),)}
    naming = Naming(part, {"w": (2048, 1024)}, {"model.w": (2048, 1024), "model.rest": (2048, 1024)})
    store.proxy.forget()
    got = torch.empty(1024, 1024)
    read = read_weights(there, naming, {"w": [(Box((512, 0), (1024, 1024)), got)]})
    assert torch.equal(got, weights[512:1536])
    assert read.bytes_read == got.nbytes
    assert store.proxy.sent["GET down"] <= 1.05 * got.nbytes + (1 << 17)  # the header, too


def test_requests_that_fail_are_made_again_and_a_store_that_is_gone_is_told(store: TestStore, tmp_path: Path) -> None:
    there = _upload(CASES["zero 1"](tmp_path), store)
    expected = load_whole(open_checkpoint(there))
    store.proxy.weather = Weather({"503": 0.15, "cut answer": 0.1}, seed=3)
    found = load_whole(open_checkpoint(there))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert store.proxy.faults.total() > 0
    store.proxy.weather = Weather({"503": 1.0})
    with pytest.raises(StoreUnusable, match="tried"):
        open_checkpoint(there.with_patience(0.5))


def test_an_object_that_is_damaged_cut_or_gone_is_told(store: TestStore, tmp_path: Path) -> None:
    there = _upload(CASES["hugging face"](tmp_path), store)
    file = there / "two.safetensors"
    content = objects_of(there).read(file)
    objects_of(there).put(file, content[:-3])
    with pytest.raises(ForeignUnusable, match=r"two\.safetensors: .* is said to be in bytes"):
        open_checkpoint(there)
    source = open_checkpoint(_upload(CASES["torch"](tmp_path / "again"), store))
    (data,) = {extent.file for tensor in source.tensors.values() for extent in tensor.extents}
    place = source.path
    assert isinstance(place, ObjectPath)
    objects_of(place).delete([place / data])
    with pytest.raises(ForeignUnusable, match="there is no such object"):
        open_checkpoint(place)
    with pytest.raises(ForeignUnusable, match="there is no such object"):
        load(source, {"w": (Interval(0, 40), torch.empty(40))}, strict=False)

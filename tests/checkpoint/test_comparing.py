"""Checkpoints of any format compared, verified, taken apart, and their loads planned, against what was done to them."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from evermesh.checkpoint import (
    Box,
    Interval,
    Shard,
    ShardMap,
    TensorShards,
    load,
    open_checkpoint,
    save,
    verify,
    wanted_regions,
)
from evermesh.checkpoint.comparing import diff
from evermesh.checkpoint.converting import Conversion, convert
from evermesh.checkpoint.errors import CheckpointMismatch, ForeignUnusable
from evermesh.checkpoint.extracting import extract
from evermesh.checkpoint.load_planning import even_map, plan_load
from evermesh.checkpoint.naming import bind
from evermesh.checkpoint.sources import Source
from tests.checkpoint.states import held_by, logical_state, save_step, shard_map
from tests.cluster import run_ranks


def _saved(folder: Path, tensors: dict[str, Tensor]) -> Source:
    """Whole tensors, saved by one rank."""
    shards = {
        name: TensorShards(str(t.dtype).removeprefix("torch."), tuple(t.shape), (Shard(Interval(0, t.numel()), (0,)),))
        for name, t in tensors.items()
    }
    return open_checkpoint(save(folder, 1, ShardMap(shards), tensors, {"cursor": {"at": 3, "nan": float("nan")}}))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state in many forms."""
    return save_step(tmp_path_factory.mktemp("ours"), 7)


@pytest.fixture(scope="module")
def theirs(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as torch keeps it."""
    directory = tmp_path_factory.mktemp("theirs") / "dcp"
    convert(open_checkpoint(ours), directory, Conversion("torch-distributed", ranks=3))
    return directory


def _save_on_rank(rank: int, ranks: int, folder: str) -> None:
    from evermesh.parallelism.collectives import Communicator

    save_step(Path(folder), 7, Communicator(torch.distributed.group.WORLD))


def test_the_same_state_of_other_topologies_and_formats_is_the_same(ours: Path, theirs: Path, tmp_path: Path) -> None:
    run_ranks(3, _save_on_rank, str(tmp_path))
    for other in (tmp_path / "step-00000007", theirs):
        found = diff(open_checkpoint(ours), open_checkpoint(other))
        assert found.same, found
        assert found.num_compared == len(logical_state(7))


def test_every_difference_is_told_with_its_first_place_and_its_size(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "w": torch.randn(7, 5, 3, generator=generator),
        "same": torch.tensor([float("nan"), 1.0]),
        "half": torch.randn(9, generator=generator).bfloat16(),
        "gone": torch.zeros(2),
        "kind": torch.zeros(4),
    }
    changed = {name: tensor.clone() for name, tensor in tensors.items() if name != "gone"}
    changed["w"][2, 3, 1] += 0.5
    changed["w"][6, 4, 2] -= 2.0
    changed["half"][8] = -changed["half"][8]
    changed |= {"kind": torch.zeros(2, 2), "new": torch.zeros(1)}
    a, b = _saved(tmp_path / "a", tensors), _saved(tmp_path / "b", changed)
    found = diff(a, b)
    assert (found.missing, found.extra, found.objects) == (("gone",), ("new",), ())
    assert found.other_kind == ("kind: float32 [4] and float32 [2, 2]",)
    half, w = sorted(found.differing, key=lambda one: one.name)
    assert (w.num_differing, w.num_elements, w.first) == (2, 105, (2, 3, 1))
    assert w.values == (float(tensors["w"][2, 3, 1]), float(changed["w"][2, 3, 1]))
    assert w.largest == pytest.approx(2.0, rel=1e-6)
    assert (half.first, half.num_differing) == ((8,), 1)


def test_a_tolerance_is_relative_and_lets_types_differ_but_bits_do_not(tmp_path: Path) -> None:
    exact = torch.linspace(-3, 3, 1000)
    a, b = _saved(tmp_path / "a", {"w": exact}), _saved(tmp_path / "b", {"w": exact.bfloat16()})
    assert diff(a, b).other_kind == ("w: float32 [1000] and bfloat16 [1000]",)
    assert diff(a, b, tolerance=2.0**-8).same
    strict = diff(a, b, tolerance=2.0**-11)
    expected = (exact - exact.bfloat16().float()).abs() > 2.0**-11 * torch.maximum(
        exact.abs(), exact.bfloat16().float().abs()
    )
    assert strict.differing[0].num_differing == int(expected.sum()) > 0
    zero = _saved(tmp_path / "c", {"w": torch.tensor([0.0])})
    assert diff(zero, _saved(tmp_path / "d", {"w": torch.tensor([-0.0])})).differing[0].num_differing == 1


def test_a_table_of_names_compares_what_is_cut_otherwise(tmp_path: Path) -> None:
    fused = torch.randn(6, 4)
    a = _saved(tmp_path / "a", {"one": fused[:2].clone(), "two": fused[2:].clone()})
    b = _saved(tmp_path / "b", {"both": fused, "more": torch.zeros(1)})
    names = bind({"one": "both", "two": "both"}, {"one": (2, 4), "two": (4, 4)})
    found = diff(a, b, names=names)
    assert (found.differing, found.missing, found.extra) == ((), (), ("more",))


def test_objects_are_compared_by_place(tmp_path: Path) -> None:
    path = save_step(tmp_path / "a", 3)
    other = save_step(tmp_path / "b", 4, state=3)
    found = diff(open_checkpoint(path), open_checkpoint(other))
    assert found.objects == ("cursor.samples: 24 and 32",)
    assert not found.differing


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_tensors_and_boxes_of_them_become_a_file_of_their_own(
    ours: Path, theirs: Path, tmp_path: Path, dtype: str | None
) -> None:
    state = logical_state(7)
    for path in (ours, theirs):
        wanted = ["model.n*", "model.qkv[3:9, :2]", "model.embed[100]", "model.scale"]
        file = tmp_path / f"{path.parent.name}.safetensors"
        extract(open_checkpoint(path), wanted, file, dtype=dtype)
        found = load_file(file)
        expected = {
            "model.norm": state["model.norm"],
            "model.qkv[3:9, 0:2]": state["model.qkv"][3:9, :2],
            "model.embed[100:101, 0:96]": state["model.embed"][100:],
            "model.scale": state["model.scale"],
        }
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.float() if dtype else tensor), name
        number = tmp_path / f"{path.parent.name}.npy"
        extract(open_checkpoint(path), ["optimizer.moment[1:300, 5:7]"], number)
        assert np.array_equal(np.load(number), state["optimizer.moment"][1:, 5:7].numpy())


def test_what_cannot_be_extracted_is_said_and_leaves_no_file(ours: Path, tmp_path: Path) -> None:
    source = open_checkpoint(ours)
    for wanted, file, error, text in (
        (["nothing*"], "a.npy", CheckpointMismatch, r"missing in the checkpoint: nothing\*"),
        (["model.qkv[3:99]"], "a.npy", CheckpointMismatch, r"model.qkv is \[32, 40\], of which \[3:99\] is no box"),
        (["model.*"], "a.npy", ForeignUnusable, "5 tensors are wanted"),
        (["model.embed"], "a.npy", ForeignUnusable, "numpy has no bfloat16"),
        (["model.norm"], "a.txt", ForeignUnusable, "no kind of file"),
    ):
        with pytest.raises(error, match=text):
            extract(source, wanted, tmp_path / file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_planned_load_reads_what_a_load_then_reads(ours: Path, theirs: Path, ranks: int) -> None:
    for path, cut in ((ours, shard_map(ranks)), (theirs, shard_map(ranks)), (theirs, None)):
        source = open_checkpoint(path)
        wanted = cut or even_map(source, ranks)
        planned = list(plan_load(source, wanted, range(ranks)))
        assert len(planned) == ranks
        for rank, plan in enumerate(planned):
            if cut is not None:
                held = held_by(rank, ranks, logical_state(0))
            else:
                regions = wanted.of_rank(rank)
                held = {
                    n: [torch.empty(r.num_elements, dtype=getattr(torch, source.tensors[n].dtype)) for r in of_tensor]
                    for n, of_tensor in regions.items()
                }
            result = load(source, wanted_regions(wanted, rank, held), shard_map=wanted)
            assert plan.bytes_read == result.bytes_read, (path, rank)
            assert plan.bytes_needed <= plan.bytes_read


def test_a_load_of_something_else_is_not_planned(ours: Path) -> None:
    wanted = ShardMap({"model.norm": TensorShards("float32", (5,), (Shard(Box((0,), (5,)), (0,)),))})
    with pytest.raises(CheckpointMismatch, match=r"model.norm is \[96\] there, \[5\] is wanted"):
        list(plan_load(open_checkpoint(ours), wanted, [0]))


def test_a_flipped_bit_that_torch_does_not_see_is_found(tmp_path: Path) -> None:
    """In a checkpoint that torch has written; its own reader takes 0 of 200 amiss."""
    state = {"w": torch.arange(40_000, dtype=torch.float32), "b": torch.arange(30_000, dtype=torch.bfloat16)}
    path = tmp_path / "dcp"
    dcp_save(state, checkpoint_id=path, no_dist=True)
    assert verify(path).ok
    (file,) = path.glob("*.distcp")
    content, choice = file.read_bytes(), random.Random(3)
    starts = [content.index(tensor.view(torch.uint8).numpy().tobytes()) for tensor in state.values()]
    for start, tensor in list(zip(starts, state.values(), strict=True)) * 10:
        changed = bytearray(content)
        changed[start + choice.randrange(tensor.nbytes)] ^= 1 << choice.randrange(8)
        file.write_bytes(changed)
        (problem,) = verify(path).problems
        assert (problem.kind, problem.file) == ("checksum", file.name)
        assert "is not what was saved" in problem.text


def test_what_has_no_checksums_is_read_and_says_so(tmp_path: Path) -> None:
    source = _saved(tmp_path / "ours", {"parameter.w": torch.randn(50, 30)})
    convert(source, tmp_path / "hf", Conversion("safetensors"))
    report = verify(tmp_path / "hf")
    assert (report.ok, report.has_checksums, report.bytes_read) == (True, False, 6000)
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (problem,) = verify(tmp_path / "hf").problems
    assert problem.kind == "format"
    assert "to 6,000 of 5,999" in problem.text
    shutil.rmtree(tmp_path / "hf")

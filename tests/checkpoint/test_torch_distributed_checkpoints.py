"""Checkpoints of torch.distributed.checkpoint, against what was saved and against its own reader."""

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from evermesh.checkpoint import Interval, describe, load
from evermesh.checkpoint.errors import CheckpointCorrupt, ForeignUnusable
from evermesh.checkpoint.naming import bind
from evermesh.checkpoint.opening import open_checkpoint
from tests.checkpoint.foreign_loads import assert_loads_into_any_layout, load_whole, refusal
from tests.checkpoint.test_pickles import Evil
from tests.cluster import run_ranks

SHAPES = {"rows": (7, 5), "columns": (5, 9), "both": (6, 7), "same": (3,)}


def _matrix(name: str) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name)))


def _save(rank: int, ranks: int, folder: str) -> None:
    """Save a trained model under FSDP2, and DTensors on a mesh of two axes; beside it what they hold, gathered."""
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("a", "b"))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 3), nn.Linear(3, 7, bias=False)).to(torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.tensor([rank, 3])).float().square().mean().backward()
    optimizer.step()
    state_dicts: Any = get_state_dict(model, optimizer)
    weights, states = state_dicts
    placements: dict[str, list[Any]] = {
        "rows": [Shard(0), Replicate()],
        "columns": [Replicate(), Shard(1)],
        "both": [Shard(1), Shard(0)],
        "same": [Replicate(), Replicate()],
    }
    cut = {name: distribute_tensor(_matrix(name), mesh, where) for name, where in placements.items()}
    scalars = {"step": 12, "rate": 0.5, "note": "text", "nested": {"list": [1, (2, 3)]}, "number": torch.tensor(4)}
    plain = {"random": torch.get_rng_state(), "half": torch.arange(6).to(torch.float8_e5m2)}
    state = {"model": weights, "optimizer": states, "cut": cut, "plain": plain, **scalars}
    save(state, checkpoint_id=folder)
    whole = {f"cut.{name}": tensor for name, tensor in cut.items()} | {f"plain.{n}": t for n, t in plain.items()}
    whole |= {f"model.{name}": tensor for name, tensor in weights.items()}
    for name, of_weight in states["state"].items():
        whole |= {f"optimizer.state.{name}.{kind}": tensor for kind, tensor in of_weight.items()}
    gathered = {name: t.full_tensor() if isinstance(t, DTensor) else t.detach() for name, t in whole.items()}
    if rank == 0:
        torch.save(gathered, f"{folder}.pt")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.parity)], ids="{} ranks".format)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Saved":
    """A checkpoint, and what its ranks held."""
    path = tmp_path_factory.mktemp("distributed") / "checkpoint"
    run_ranks(request.param, _save, str(path))
    return path, torch.load(f"{path}.pt") | {"number": torch.tensor(4)}


Saved = tuple[Path, dict[str, Tensor]]


def test_every_tensor_is_what_was_saved_in_any_layout(saved: Saved) -> None:
    path, expected = saved
    source = open_checkpoint(path)
    whole = load_whole(source)
    assert whole.keys() == expected.keys()
    for name, tensor in expected.items():
        assert whole[name].dtype == tensor.dtype
        assert torch.equal(whole[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    for ranks in (1, 3):
        assert_loads_into_any_layout(source, whole, ranks)


def test_what_is_no_tensor_is_an_object(saved: Saved) -> None:
    source = open_checkpoint(saved[0])
    chosen = {name: source.objects[name] for name in ("step", "rate", "note")}
    assert chosen == {"step": 12, "rate": 0.5, "note": "text"}
    group = {name: source.objects[f"optimizer.param_groups.0.{name}"] for name in ("lr", "params")}
    assert group == {"lr": 0.01, "params": ["0.weight", "1.weight", "1.bias", "2.weight"]}
    assert source.objects["nested.list"] == [1, [2, 3]]
    assert source.left_out == ()


def test_it_describes_itself_in_json(saved: Saved) -> None:
    path, expected = saved
    told: Any = describe(path)
    assert json.loads(json.dumps(told)) == told
    assert (told["format"], told["step"], told["left_out"]) == ("torch-distributed", None, [])
    assert {(t["name"], tuple(t["shape"]), t["num_bytes"]) for t in told["tensors"]} == {
        (name, tuple(tensor.shape), tensor.nbytes) for name, tensor in expected.items()
    }
    assert told["files"] == {file.name: file.stat().st_size for file in path.glob("*.distcp")}


def test_its_own_reader_gives_the_same(saved: Saved, tmp_path: Path) -> None:
    path, _ = saved
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    oracle = torch.load(tmp_path / "whole.pt", weights_only=False)
    whole = load_whole(open_checkpoint(path))
    for name, tensor in oracle["model"].items():
        assert torch.equal(whole[f"model.{name}"], tensor)
    assert torch.equal(whole["cut.both"], _matrix("both"))


def test_weights_go_by_a_table_of_names_into_another_type(saved: Saved) -> None:
    path, expected = saved
    names = {"embedding.weight": "model.0.weight", "{layer}.weight": "model.{layer}.weight", "one.bias": "model.1.bias"}
    shapes = {"embedding.weight": (11, 5), "1.weight": (3, 5), "2.weight": (7, 3), "one.bias": (3,)}
    naming = bind(names, shapes, unread=("*",))
    wanted = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    result = load(path, {n: (Interval(0, t.numel()), t) for n, t in wanted.items()}, names=naming)
    for name, theirs in (("embedding.weight", "0.weight"), ("1.weight", "1.weight"), ("one.bias", "1.bias")):
        assert torch.equal(wanted[name], expected[f"model.{theirs}"].double())
    assert result.bytes_read == 2 * sum(t.numel() for t in wanted.values())


def _copy(saved: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def test_metadata_that_asks_for_code_or_for_files_elsewhere_is_refused(saved: Saved, tmp_path: Path) -> None:
    path = _copy(saved, tmp_path)
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())  # noqa: S301
    for info in metadata.storage_data.values():
        info.relative_path = f"../{saved[0].name}/{info.relative_path}"
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ForeignUnusable, match="which is not inside it"):
        open_checkpoint(path)
    metadata.planner_data = Evil(tmp_path / "was here")
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ForeignUnusable, match=r"holds the global 'posix\.system'"):
        open_checkpoint(path)
    assert not (tmp_path / "was here").exists()


def test_a_missing_file_and_an_overwritten_one_are_refused(saved: Saved, tmp_path: Path) -> None:
    path = _copy(saved, tmp_path)
    first, second, *_ = sorted(path.glob("*.distcp"))
    first.write_bytes(second.read_bytes() + bytes(20_000))
    with pytest.raises((ForeignUnusable, CheckpointCorrupt), match=first.name):
        load_whole(open_checkpoint(path))
    first.unlink()
    with pytest.raises(ForeignUnusable, match="cannot be read"):
        open_checkpoint(path)


def test_damaged_files_give_a_clear_error_or_an_index(saved: Saved, tmp_path: Path) -> None:
    path, choice, refused = _copy(saved, tmp_path), random.Random(9), 0
    files = [path / ".metadata", *path.glob("*.distcp")]
    for round_ in range(120):
        file = files[0] if round_ % 2 else choice.choice(files)
        content = file.read_bytes()
        changed = bytearray(content)
        for _ in range(choice.randrange(1, 5)):
            changed[choice.randrange(len(changed))] = choice.randrange(256)
        file.write_bytes(changed[: choice.randrange(len(changed))] if round_ % 5 == 0 else changed)
        reason = refusal(path)
        assert reason is None or str(path) in reason
        refused += reason is not None
        file.write_bytes(content)
    assert refused > 20


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_chunk_with_strides_is_refused_by_name(tmp_path: Path) -> None:
    save({"transposed": torch.arange(12.0).view(3, 4).t()}, checkpoint_id=tmp_path / "strided", no_dist=True)
    source = open_checkpoint(tmp_path / "strided")
    got = torch.zeros(4, 3)
    with pytest.raises(ForeignUnusable, match=r"strides \[1, 4\].*Make the tensor contiguous"):
        load(source, {"transposed": (Interval(0, 12), got)})


def _save_in_other_forms(rank: int, ranks: int, folder: str) -> dict[str, Tensor]:
    """As safetensors files of every rank, as consolidated ones, and with metadata of every rank."""
    mesh = init_device_mesh("cpu", (ranks,))
    cut = {name: distribute_tensor(_matrix(name), mesh, [where]) for name, where in _PLACEMENTS.items()}
    sharded = HuggingFaceStorageWriter(f"{folder}/sharded", save_distributed=True)
    save(cut, storage_writer=sharded)
    consolidated = HuggingFaceStorageWriter(f"{folder}/consolidated", save_distributed=True, enable_consolidation=True)
    save(cut, storage_writer=consolidated)
    save(cut | {"step": 7}, checkpoint_id=f"{folder}/each", use_collectives=False)
    loaded: dict[str, Tensor] = {name: torch.zeros(SHAPES[name]) for name in SHAPES}
    load_distributed(loaded, storage_reader=HuggingFaceStorageReader(f"{folder}/sharded"))
    return loaded


_PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "both": Shard(1), "same": Replicate()}


def test_its_other_forms_are_read_like_the_first(tmp_path: Path) -> None:
    loaded = run_ranks(3, _save_in_other_forms, str(tmp_path))
    for form, kind in (
        ("sharded", "torch-distributed"),
        ("consolidated", "safetensors"),
        ("each", "torch-distributed"),
    ):
        source = open_checkpoint(tmp_path / form)
        whole = load_whole(source)
        assert source.kind == kind
        assert whole.keys() == SHAPES.keys()
        assert source.left_out == ()
        assert source.objects == ({"step": 7} if form == "each" else {})
        for name, tensor in whole.items():
            assert torch.equal(tensor, _matrix(name)), (form, name)
            assert torch.equal(tensor, loaded[0][name])  # by its own reader
        assert_loads_into_any_layout(source, whole, 2)


def test_chunks_of_ranks_that_are_missing_or_belong_nowhere_are_refused(tmp_path: Path) -> None:
    run_ranks(2, _save_in_other_forms, str(tmp_path))
    first, second = sorted((tmp_path / "sharded").glob("shard-*"))
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(ForeignUnusable, match=r"do not fit together: tensor .* a gap"):
        open_checkpoint(tmp_path / "sharded")
    for old, new in ((b"DCP_SHARDING_INFO", b"DCP_SHARDING_INF0"), (b"saved_offsets", b"saved_0ffsets")):
        first.write_bytes(content.replace(old, new))
        with pytest.raises(ForeignUnusable, match="does not say where its tensors belong"):
            open_checkpoint(tmp_path / "sharded")
    shutil.copy(second, first)
    with pytest.raises(ForeignUnusable, match=r"overlap|gap"):
        open_checkpoint(tmp_path / "sharded")
    (tmp_path / "each" / "__1.metadata").rename(tmp_path / "each" / "__2.metadata")
    with pytest.raises(ForeignUnusable, match="of ranks 0 to 2 some lack their metadata"):
        open_checkpoint(tmp_path / "each")

"""Checkpoints that are written for other libraries, judged by these libraries."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

from evermesh.checkpoint import Box, Interval, Shard, ShardMap, TensorShards, load, open_checkpoint, save
from evermesh.checkpoint.comparing import diff
from evermesh.checkpoint.converting import Conversion, convert
from evermesh.checkpoint.errors import CheckpointCorrupt, ForeignUnusable
from evermesh.checkpoint.formats import FORMATS, Format
from evermesh.checkpoint.sources import Source
from tests.checkpoint.foreign_engines import MORE_STEPS, Job, Outcome, continue_jobs, save_and_continue
from tests.checkpoint.foreign_saves import STEPS, Case, Tiny, groups_of
from tests.checkpoint.states import logical_state, save_step
from tests.cluster import peak_memory, run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is missing")
ROUND_ROBIN = Case(2, "sgd", zero=(("round_robin_gradients", True),))
SLICE = (Case(1), Case(3, "adamw", "bfloat16", (("sub_group_size", 30),)))
WIDE = (
    *SLICE,
    ROUND_ROBIN,
    Case(1, "lion", "bfloat16"),
    Case(2, "adamw", "bfloat16"),
    Case(3, "sgd"),
    Case(2, "adamw", steps=0),
)
NATIVE: tuple[Format, ...] = ("deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3")


def read(source: Source) -> dict[str, Tensor]:
    """All tensors."""
    found = {name: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for name, t in source.tensors.items()}
    load(source, {name: (Interval(0, tensor.numel()), tensor) for name, tensor in found.items()})
    return found


class Saves:
    """Saves, and what the engines that saved do when they go on."""

    def __init__(self, folder: Path, cases: tuple[Case, ...], ranks: int) -> None:
        self.folder = folder
        outcomes = run_ranks(ranks, save_and_continue, str(folder), cases, timeout_s=170.0)[0]
        self.outcomes = dict(zip(cases, outcomes, strict=True))

    def source(self, case: Case) -> Source:
        """What was saved."""
        return open_checkpoint(self.folder / case.name)

    def job(self, case: Case, to: Format, stage: int, folder: Path, ranks: int) -> Job:
        """A save converted, and the engine of a stage that is to load it."""
        directory = folder / f"{case.name}-{to}-{ranks}"
        if not directory.exists():
            convert(self.source(case), directory, Conversion(to, ranks if to in NATIVE else 1))
        is_universal = to == "deepspeed-universal"
        # what the library links its masters to, it mistakes with this option, universal ones and those it gives away
        zero = () if is_universal and case == ROUND_ROBIN else case.zero
        return Job(case._replace(stage=stage, zero=zero), str(directory), is_universal)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    return Saves(tmp_path_factory.mktemp("deepspeed"), SLICE, ranks=2)


@pytest.fixture(scope="module")
def all_saves(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    return Saves(tmp_path_factory.mktemp("wide"), WIDE, ranks=3)


def _check(case: Case, job: Job, got: Outcome, expected: Outcome) -> None:
    """An engine holds what was saved and goes on as the one that saved it, on another number of ranks."""
    # its universal loader of stage 3 lets all groups count one step together: the updates after it are its own
    steps = 1 if job.universal and job.case.stage == 3 and case.optimizer == "adamw" else MORE_STEPS
    tolerance = 1e-6 if case.dtype == "float32" else 1e-2
    assert got.losses[:steps] == pytest.approx(expected.losses[:steps], rel=tolerance, abs=0.0)
    assert (got.settings, got.counters, got.scheduler) == (expected.settings, expected.counters, expected.scheduler)
    if case != ROUND_ROBIN:
        assert got.live.keys() == expected.live.keys()
        for name, tensor in expected.live.items():
            assert torch.equal(got.live[name], tensor), name
    if job.universal:  # its loader leaves them as they are
        return
    for name, tensor in expected.module.items():
        assert torch.equal(got.module[name], tensor), name
    assert got.client["iteration"] == expected.client["iteration"]
    assert torch.equal(got.client["random"], expected.client["random"])


def test_engines_of_another_stage_go_on_with_the_same_losses_on_another_number_of_ranks(
    saves: Saves, tmp_path: Path
) -> None:
    plan: list[tuple[Case, Format, int]] = [
        (SLICE[0], "deepspeed-zero3", 3),
        (SLICE[0], "deepspeed-universal", 3),
        (SLICE[1], "deepspeed-zero2", 2),
        (SLICE[1], "deepspeed-universal", 1),
    ]
    _go_on(saves, plan, tmp_path, ranks=1)


def _go_on(saves: Saves, plan: list[tuple[Case, Format, int]], folder: Path, ranks: int) -> None:
    jobs = [saves.job(case, to, stage, folder, ranks) for case, to, stage in plan]
    outcomes = run_ranks(ranks, continue_jobs, jobs, timeout_s=170.0)[0]
    for (case, _, _), job, got in zip(plan, jobs, outcomes, strict=True):
        _check(case, job, got, saves.outcomes[case])


@pytest.mark.parity
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_every_kind_of_save_goes_on_in_every_stage(all_saves: Saves, case: Case, ranks: int, tmp_path: Path) -> None:
    plan: list[tuple[Case, Format, int]] = [(case, to, stage) for stage, to in enumerate(NATIVE, start=1)]
    # its universal loader cannot load what was never updated, in stage 3 asks for the states of Adam, and in the others
    # fails on a rank whose part of a group is padding
    stages = [1, 2] * (case.steps > 0 and ranks < 4) + [3] * (case.steps > 0 and case.optimizer == "adamw")
    plan += [(case, "deepspeed-universal", stage) for stage in stages]
    _go_on(all_saves, plan, tmp_path, ranks)


@pytest.mark.parametrize("to", NATIVE)
@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_its_own_consolidation_gives_the_weights(saves: Saves, case: Case, to: Format, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    convert(saves.source(case), tmp_path / "new", Conversion(to, ranks=5))
    oracle = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "new"))
    ours = {
        n.partition(".")[2]: t for n, t in read(saves.source(case)).items() if n.startswith(("parameter.", "buffer."))
    }
    assert oracle.keys() == ours.keys()
    for name, tensor in oracle.items():
        assert torch.equal(ours[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("to", [to for to in FORMATS if to != "safetensors"])
@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_a_round_trip_gives_every_bit_and_all_else_back(saves: Saves, case: Case, to: Format, tmp_path: Path) -> None:
    """There, and on to our own format, against what was saved."""
    source = saves.source(case)
    there = convert(source, tmp_path / "there", Conversion(to, 1 if to in ("evermesh", "deepspeed-universal") else 3))
    back = convert(open_checkpoint(there.path), tmp_path / "back", Conversion("evermesh"))
    assert (there.left_out, back.left_out) == ((), ())
    found, expected = open_checkpoint(back.path), read(source)
    tensors = read(found)
    tied = {n for n in expected if n.endswith("head.weight") and not n.startswith("parameter.")}
    assert expected.keys() - tensors.keys() <= tied
    assert tensors.keys() <= expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    changed = ("zero_stage", "config") if to in NATIVE else ("zero_stage",) if to == "deepspeed-universal" else ()
    kept = source.objects.keys() - set(changed)
    assert {key: found.objects[key] for key in kept} == {key: source.objects[key] for key in kept}
    assert (found.step, found.description["converted_from"]) == (STEPS, there_kind(to))


def there_kind(to: Format) -> str:
    """What a format is called when it is read."""
    return "deepspeed" if to in NATIVE else to


def test_torch_loads_what_it_has_not_written_into_other_shardings(tmp_path: Path) -> None:
    convert(
        open_checkpoint(save_step(tmp_path / "ours", 7)), tmp_path / "dcp", Conversion("torch-distributed", ranks=3)
    )
    loaded = run_ranks(2, _load_sharded, str(tmp_path / "dcp"))
    for name, tensor in logical_state(7).items():
        assert torch.equal(loaded[0][name], tensor), name


def _load_sharded(rank: int, ranks: int, path: str) -> dict[str, Tensor]:
    """Load by columns where there are any, with the library alone, and gather."""
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    state = {
        name: distribute_tensor(torch.zeros_like(t), mesh, [Shard(t.dim() - 1) if t.dim() > 1 else Replicate()])
        for name, t in logical_state(0).items()
    }
    dcp_load(state, checkpoint_id=path)
    return {name: tensor.full_tensor() for name, tensor in state.items() if isinstance(tensor, DTensor)}


def test_torch_gets_model_and_optimizer_by_the_names_it_uses(saves: Saves, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    source = saves.source(SLICE[0])
    convert(source, tmp_path / "dcp", Conversion("torch-distributed", ranks=2))
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=False)
    model = Tiny()
    model.load_state_dict(state["model"])
    expected = read(source)
    for name, tensor in model.state_dict().items():
        kind = "buffer." if name in ("scale", "count") else "parameter."
        assert torch.equal(tensor, expected[kind + name]), name
    optimizer = torch.optim.AdamW(groups_of(model))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            found = optimizer.state[weight]
            assert torch.equal(found["exp_avg"], expected[f"exp_avg.{name}"])
            assert found["step"] == STEPS


def test_weights_of_any_format_become_safetensors_and_the_rest_is_named(saves: Saves, tmp_path: Path) -> None:
    from safetensors.torch import load_file, load_model

    source, expected = saves.source(SLICE[1]), read(saves.source(SLICE[1]))
    written = convert(source, tmp_path / "hf", Conversion("safetensors", dtype="bfloat16"))
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["scale"].dtype == torch.bfloat16
    for name, tensor in tensors.items():
        kind = "buffer." if name in ("scale", "count") else "parameter."
        assert torch.equal(tensor, expected[kind + name].to(tensor.dtype))
    model = Tiny().bfloat16()
    load_model(model, tmp_path / "hf" / "model.safetensors")  # knows that head and embedding are one
    assert torch.equal(model.head.weight, tensors["embedding.weight"])
    compared = diff(open_checkpoint(tmp_path / "hf"), source, tolerance=2.0**-8)
    assert (compared.differing, compared.missing, compared.num_compared) == ((), (), 8)
    assert {"client.random", "object groups", "exp_avg.* (5 tensors)"} <= set(written.left_out)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = save_step(tmp_path / "ours", 3)
    (file,) = path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointCorrupt, match="checksum is wrong"):
        convert(open_checkpoint(path), tmp_path / "new", Conversion("torch-distributed"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ours"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ForeignUnusable, match="not empty"):
        convert(open_checkpoint(path), tmp_path / "mine", Conversion("torch-distributed"))


def test_what_an_engine_needs_and_a_checkpoint_lacks_is_asked_for(tmp_path: Path) -> None:
    """Weights alone have no groups; given these, they become a checkpoint of an engine."""
    tensors = {
        f"{kind}.{name}": torch.randn(3, 4) for kind in ("parameter", "exp_avg", "exp_avg_sq") for name in ("a", "b")
    }
    shards = {name: TensorShards("float32", (3, 4), (Shard(Box((0, 0), (3, 4)), (0,)),)) for name in tensors}
    source = open_checkpoint(save(tmp_path / "ours", 5, ShardMap(shards), tensors, {"cursor": 9}))
    with pytest.raises(ForeignUnusable, match=r"does not say which weights.*--groups"):
        convert(source, tmp_path / "new", Conversion("deepspeed-zero1"))
    groups = [
        {"names": ["a"], "settings": {"lr": 0.1}, "numbers": {"step": 5.0}},
        {"names": ["*"], "settings": {"lr": 1}},
    ]
    convert(source, tmp_path / "new", Conversion("deepspeed-zero1", 2, groups=groups))
    back = open_checkpoint(tmp_path / "new")
    for name, tensor in read(back).items():
        assert torch.equal(tensor, tensors[name])
    found = cast(Any, back.objects)
    assert [(group["names"], group["settings"]["lr"]) for group in found["groups"]] == [(["a"], 0.1), (["b"], 1)]
    assert found["client"] == {"evermesh": {"cursor": 9}}


def test_parameters_dealt_out_to_ranks_are_read_as_its_consolidation_reads_them(tmp_path: Path) -> None:
    """Five parameters on two ranks: with ``round_robin_gradients`` they lie in another order."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    names = "abcde"
    tensors = {
        f"{kind}.{n}": torch.randn(3, 4 + ord(n) % 7) for kind in ("parameter", "momentum_buffer") for n in names
    }
    shards = {
        n: TensorShards("float32", tuple(t.shape), (Shard(Interval(0, t.numel()), (0,)),)) for n, t in tensors.items()
    }
    groups = [{"names": list(names), "settings": {"lr": 0.1}, "numbers": {}}]
    objects = {"config": {"zero_optimization": {"round_robin_gradients": True}}, "groups": groups}
    source = open_checkpoint(save(tmp_path / "ours", 5, ShardMap(shards), tensors, cast(Any, objects)))
    convert(source, tmp_path / "dealt", Conversion("deepspeed-zero2", ranks=2))
    back = open_checkpoint(tmp_path / "dealt")
    assert cast(Any, back.objects)["groups"][0]["names"] == ["a", "c", "e", "b", "d"]
    for name, tensor in read(back).items():
        assert torch.equal(tensor, tensors[name]), name
    oracle = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "dealt"))
    assert all(torch.equal(oracle[name], tensors[f"parameter.{name}"]) for name in names)
    convert(back, tmp_path / "again", Conversion("deepspeed-zero1", ranks=3))
    assert cast(Any, open_checkpoint(tmp_path / "again").objects)["groups"][0]["names"] == ["a", "d", "b", "e", "c"]


@pytest.mark.parity
def test_what_an_engine_has_dealt_out_goes_on_in_another_stage(tmp_path: Path) -> None:
    """Saved by two ranks, where dealing changes the order: states too are those of their parameters."""
    saves = Saves(tmp_path / "saves", (ROUND_ROBIN,), ranks=2)
    _go_on(saves, [(ROUND_ROBIN, "deepspeed-zero3", 3), (ROUND_ROBIN, "deepspeed-zero2", 2)], tmp_path, ranks=1)


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    source = open_checkpoint(save_step(tmp_path / "ours", 3))
    wrong = {
        "any number of ranks": Conversion("evermesh", ranks=2),
        "keeps every tensor": Conversion("torch-distributed", dtype="bfloat16"),
        "called as a weight": Conversion("safetensors"),
    }
    for text, conversion in wrong.items():
        with pytest.raises(ForeignUnusable, match=text):
            convert(source, tmp_path / "new", conversion)
    assert not (tmp_path / "new").exists()


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """A tensor of 384 MiB on its way from one library's format to another's takes a fraction of that."""
    tensor = torch.arange(96 << 20, dtype=torch.int32).view(torch.float32)
    shards = ShardMap({"parameter.w": TensorShards("float32", (96, 1 << 20), (Shard(Interval(0, 96 << 20), (0,)),))})
    path = save(tmp_path / "ours", 1, shards, {"parameter.w": tensor}, {})
    del tensor
    with peak_memory() as peak:
        convert(open_checkpoint(path), tmp_path / "new", Conversion("torch-distributed", ranks=2))
    assert peak.num_bytes < 200 << 20
    shutil.rmtree(tmp_path)

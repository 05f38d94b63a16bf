"""Checkpoints of DeepSpeed in which ranks share a model, against what these held and against its own conversion."""

import argparse
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.foreign.patterns import Combined, Divided, Fused, Replicated, combine
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.regions import Box, Padding, Permutation, StoredForm
from tests.checkpoint.foreign_loads import assert_loads_into_any_layout, load_whole
from tests.checkpoint.parallel_saves import FUSED, HIDDEN, TENSOR, VOCABULARY, Case, save_parallel
from tests.checkpoint.test_fuzz import fuzz
from tests.cluster import run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is missing")
RANKS = 4
SLICE = (Case("experts", 2, "bfloat16"), Case("pipeline-tensor", 1))
WIDE = (
    *SLICE,
    Case("experts", 1),
    Case("tensor", 1),
    Case("tensor", 2),
    Case("tensor", 3),
    Case("tied", 1, "bfloat16"),
    Case("tied", 1),
)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases of ``SLICE``."""
    return _save(tmp_path_factory.mktemp("parallel"), SLICE)


def _save(folder: Path, cases: tuple[Case, ...]) -> Path:
    run_ranks(RANKS, save_parallel, str(folder), cases, timeout_s=170.0)
    return folder


def _expected(directory: Path, case: Case) -> dict[str, Tensor]:
    """Masters and states of the whole model, from what every rank held under its own names."""
    live: list[dict[str, Tensor]] = [torch.load(directory / f"live-{rank}.pt") for rank in range(RANKS)]
    if case.kind == "experts":  # expert parallel ranks are neighbours
        return live[0] | {_global(name, rank): t for rank in (0, 1) for name, t in live[rank].items()}
    if case.kind == "tied":
        tied = "parameter.tied_modules.ends.weight"
        assert torch.equal(live[0][tied], live[2][tied])
        return live[2] | live[0]
    stages = [live[:2], live[2:]] if case.kind == "pipeline-tensor" else [live[:2]]
    return {name: _joined(name, [of[name] for of in stage]) for stage in stages for name in stage[0]}


def _global(name: str, rank: int) -> str:
    before, experts, after = name.partition("deepspeed_experts.")
    number, _, rest = after.partition(".")
    num_local = 2 if "many" in name else 1
    return f"{before}{experts}{rank * num_local + int(number)}.{rest}" if experts else name


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """The formulas of tensor parallelism, by hand."""
    if name.endswith("table.weight"):
        return torch.cat(parts)[:VOCABULARY]
    if "norm" in name or name.endswith("out.bias"):
        assert torch.equal(*parts)
        return parts[0]
    if name.endswith("gate.weight"):
        return torch.cat([torch.cat(halves) for halves in zip(*(part.chunk(2) for part in parts), strict=True)])
    if name.endswith("qkv.weight"):
        cut = [part.split([size // TENSOR for size in FUSED]) for part in parts]
        return torch.cat([torch.cat(of_one) for of_one in zip(*cut, strict=True)])
    return torch.cat(parts, 1)


def _frozen() -> Tensor:
    parts = [
        torch.empty(HIDDEN, 3).normal_(generator=torch.Generator().manual_seed(60 + rank)) for rank in range(TENSOR)
    ]
    return torch.cat(parts, 1)


def _check_case(directory: Path, case: Case) -> None:
    source = open_checkpoint(directory)
    assert (source.kind, source.step, source.world_size) == ("deepspeed", 2, RANKS)
    whole, expected = load_whole(source), _expected(directory, case)
    for name, tensor in expected.items():
        assert torch.equal(whole[name], tensor), name
    others = whole.keys() - expected.keys()
    if case.kind == "experts":
        experts = {f"parameter.few.deepspeed_moe.experts.deepspeed_experts.{expert}.0.bias" for expert in (0, 1)}
        assert others == {"parameter.few.mlp.0.bias"} | experts
    else:
        still = [name for name in whole if name.endswith("still.weight")]
        assert len(others) == len(still) + 2
        assert all(whole[name].tolist() == [0.5, 1.5] for name in whole if name.startswith("buffer."))
        for name in still if case.kind != "tied" else ():
            assert torch.equal(whole[name], _frozen())
    for ranks in (1, 3):
        assert_loads_into_any_layout(source, whole, ranks)


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_every_tensor_is_what_the_ranks_held_in_any_layout(saves: Path, case: Case) -> None:
    _check_case(saves / case.name, case)


def test_groups_have_the_names_of_all_ranks(saves: Path) -> None:
    for case in SLICE:
        objects: Any = open_checkpoint(saves / case.name).objects
        named = [name for group in objects["groups"] for name in group["names"]]
        trained = {
            name.partition(".")[2] for name in _expected(saves / case.name, case) if name.startswith("parameter")
        }
        assert sorted(named) == sorted(trained)
        assert {group["settings"]["weight_decay"] for group in objects["groups"]} == {0.1, 0.0}
        assert all(group["numbers"] == {"step": 2.0} for group in objects["groups"])


def test_its_own_conversion_gives_the_same(saves: Path, tmp_path: Path) -> None:
    _check_conversion(saves / SLICE[1].name, tmp_path / "universal")


def _check_conversion(directory: Path, universal: Path) -> None:
    """Its atoms, read by its own format, are what we read from the native files."""
    from deepspeed.checkpoint.ds_to_universal import main

    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": False}
    native = directory / "global_step2"
    main(
        argparse.Namespace(
            input_folder=str(native), output_folder=str(universal), inject_missing_state=True, **settings
        )
    )
    ours, source = load_whole(open_checkpoint(native)), open_checkpoint(universal)
    atoms = load_whole(source)
    trained = {name for name in ours if not name.startswith("buffer.") and not name.endswith("still.weight")}
    assert trained <= atoms.keys()
    for name in trained:
        assert torch.equal(atoms[name], ours[name]), name
    folder = universal / "zero"
    for atom in folder.iterdir():
        if atom.is_dir() and f"exp_avg.{atom.name}" in ours:
            found = torch.load(atom / "exp_avg.pt", weights_only=False)
            found = found["param"] if isinstance(found, dict) else found
            assert torch.equal(found.flatten(), ours[f"exp_avg.{atom.name}"].flatten())


@pytest.fixture
def altered(saves: Path, tmp_path: Path) -> "Altered":
    """A copy of the save with tensor and pipeline parallelism."""
    return Altered(Path(shutil.copytree(saves / SLICE[1].name / "global_step2", tmp_path / "tag")))


class Altered:
    """A folder whose first file of the model is changed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refusal(self, **info: Any) -> str:
        """Why it is refused if it is said otherwise how tensors are divided."""
        file = self.path / "mp_rank_00_model_states.pt"
        state = torch.load(file, weights_only=False)
        before = dict(state["universal_checkpoint_info"])
        state["universal_checkpoint_info"] |= info
        torch.save(state, file)
        with pytest.raises(ForeignUnusable) as raised:
            open_checkpoint(self.path)
        state["universal_checkpoint_info"] = before
        torch.save(state, file)
        open_checkpoint(self.path)
        return str(raised.value)


def test_patterns_that_do_not_fit_are_refused_with_the_reason(altered: Altered) -> None:
    refusal = altered.refusal
    assert "'nothing', which no parameter matches" in refusal(
        vocabulary_parameter_patterns=["nothing", r".*table\.weight"]
    )
    assert "is the mean of what its 2" in refusal(
        parameter_to_average_patterns=[r".*norm\.bias"],
        tp_replicated_parameter_patterns=[r".*norm\.weight", r".*out\.bias"],
    )
    assert "does not fit 0.table.weight: 14 rows are there of 15" in refusal(original_vocab_size=15)
    assert "its vocabulary has many words" in refusal(original_vocab_size="many")
    assert "fused widths" in refusal(sub_param_shard_widths={r".*qkv\.weight": [[1, 3], [1, 1], [1, 1]]})
    assert "has the widths" in refusal(sub_param_shard_widths={r".*qkv\.weight": [[-1, 3], [1, 1], [1, 1]]})
    assert "says that 1.out.bias cannot be put together" in refusal(
        autotp_unsupported_parameter_patterns=[r".*out\.bias"]
    )
    scaled = {"logical_shape": [4], "ranks": {0: {"shard_shape": [4], "pieces": [{"scale": 0.5}]}}}
    assert "times 0.5" in refusal(affine_map={"version": 1, "params": {r".*out\.bias": scaled}})


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(" + "a|a)(" * 60 + "b)", ".*" * 12 + "z", "a" * 2000, r"(x)\1", "[", 7]
)
def test_patterns_that_could_take_for_ever_are_refused(altered: Altered, pattern: Any) -> None:
    assert "universal_checkpoint_info has" in altered.refusal(vocabulary_parameter_patterns=[pattern])


def test_tensor_parallelism_that_nothing_describes_is_refused(altered: Altered) -> None:
    file = altered.path / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    del state["universal_checkpoint_info"]
    torch.save(state, file)
    with pytest.raises(ForeignUnusable, match="nothing says how its 2 tensor-parallel ranks divided"):
        open_checkpoint(altered.path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mp_rank_03_model_states.pt", "of the model of 3 ranks and of the optimizer of 4"),
        ("mp_rank_02_model_states.pt", "of model-parallel ranks 0 to 3 some lack their files of the model"),
        ("zero_pp_rank_0_mp_rank_03_optim_states.pt", "of the model of 4 ranks and of the optimizer of 3"),
        ("layer_01-model_01-model_states.pt", "not as DeepSpeed writes them"),
    ],
)
def test_files_that_are_missing_are_named(altered: Altered, name: str, reason: str) -> None:
    (altered.path / name).unlink()
    with pytest.raises(ForeignUnusable, match=reason):
        open_checkpoint(altered.path)


def test_stages_of_two_steps_are_not_mixed(altered: Altered) -> None:
    file = altered.path / "mp_rank_02_model_states.pt"
    state = torch.load(file, weights_only=False)
    torch.save(state | {"global_steps": 3}, file)
    with pytest.raises(ForeignUnusable, match=r"files of the model are of steps \['2', '3'\]"):
        open_checkpoint(altered.path)
    torch.save(state, file)
    file = altered.path / "zero_pp_rank_0_mp_rank_03_optim_states.pt"
    state = torch.load(file, weights_only=False)
    for of_group in state["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        of_group["step"] += 1
    torch.save(state, file)
    with pytest.raises(ForeignUnusable, match=r"model-parallel ranks 0 and 3 are of steps \['2.0', '3.0'\]"):
        open_checkpoint(altered.path)


def test_a_missing_expert_is_noticed(saves: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saves / SLICE[0].name / "global_step2", tmp_path / "tag"))
    (path / "layer_0_expert_3_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ForeignUnusable, match="files of 5 of 6 experts"):
        open_checkpoint(path)


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_damaged_files_give_a_clear_error_or_an_index(saves: Path, case: Case, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saves / case.name / "global_step2", tmp_path / "tag"))
    assert fuzz(path, 60, 5) > 10


def test_patterns_are_forms_of_our_own_maps() -> None:
    assert combine(Replicated(), [(3,), (3,)]) == Combined(StoredForm((3,)), (Box((0,), (3,)), None))
    uneven = combine(Divided(1), [(2, 3), (2, 1)])
    assert uneven == Combined(StoredForm((2, 4)), (Box((0, 0), (2, 3)), Box((0, 3), (2, 1))))
    padded = combine(Divided(), [(4, 2), (4, 2)], rows=7)
    assert padded.form == StoredForm((7, 2), padding=Padding(0, 1))
    fused = combine(Fused(0, ((2, 1), (1, 1))), [(3,), (2,)])
    assert fused.form.permutation == Permutation(0, ((0, 0, 2), (2, 3, 1), (3, 2, 1), (4, 4, 1)))
    fused.form.check()


@pytest.mark.parity
@pytest.mark.parametrize("kind", sorted({case.kind for case in WIDE}))
def test_every_kind_of_parallel_save_is_what_the_ranks_held(kind: str, tmp_path: Path) -> None:
    cases = tuple(case for case in WIDE if case.kind == kind)
    _save(tmp_path, cases)
    for case in cases:
        _check_case(tmp_path / case.name, case)
        copied = Path(shutil.copytree(tmp_path / case.name / "global_step2", tmp_path / f"{case.name}-damaged"))
        assert fuzz(copied, 100, 3) > 20
        if kind != "experts":  # of which the library converts no optimizer
            _check_conversion(tmp_path / case.name, tmp_path / f"{case.name}-universal")

"""Checkpoints of the unmodified DeepSpeed, against what its optimizer held and against its own consolidation."""

import argparse
import importlib.util
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evermesh.checkpoint import Box, CheckpointNotFound, Interval, load
from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.filling import Target
from evermesh.checkpoint.naming import bind
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.sources import with_prefixes
from tests.checkpoint.foreign_loads import assert_loads_into_any_layout, load_whole, refusal
from tests.checkpoint.foreign_saves import OPTIMIZERS, STEPS, Case, save_deepspeed
from tests.checkpoint.test_pickles import Evil
from tests.cluster import run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is missing")
SLICE = (
    Case(1),
    Case(2, "sgd", zero=(("round_robin_gradients", True),)),
    Case(3, "adamw", "bfloat16", (("sub_group_size", 30),)),
)
_ONE_GROUP_EACH = (("sub_group_size", 1),)
WIDE = tuple(
    Case(stage, optimizer, dtype, zero, steps)
    for stage in (1, 2, 3)
    for optimizer in OPTIMIZERS
    for dtype in ("float32", "bfloat16")
    for zero, steps in (
        ((), STEPS),
        ((), 0),
        (_ONE_GROUP_EACH if stage == 3 else (("round_robin_gradients", True),), 1),
    )
)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases of ``SLICE``, saved by three ranks."""
    return _save(tmp_path_factory.mktemp("deepspeed"), 3, SLICE)


def _save(folder: Path, ranks: int, cases: Sequence[Case]) -> Path:
    run_ranks(ranks, save_deepspeed, str(folder), cases, timeout_s=170.0)
    return folder


def _live(directory: Path) -> dict[str, Tensor]:
    live: dict[str, Tensor] = torch.load(directory / "live.pt")
    return live


def _check_case(directory: Path, case: Case, ranks: int) -> None:
    source = open_checkpoint(directory)
    assert (source.kind, source.step, source.world_size) == ("deepspeed", case.steps, ranks)
    assert source.left_out == ()
    whole, live = load_whole(source), _live(directory)
    assert len(live) == 5 * (1 + (len(OPTIMIZERS[case.optimizer][2]) if case.steps else 0))
    # dealt out to two ranks, three parameters change their order, which the library forgets when it is asked for them;
    # test_converting has an oracle that it does not mislead
    is_dealt = ("round_robin_gradients", True) in case.zero and ranks == 2
    for name, tensor in live.items():
        assert is_dealt or torch.equal(whole[name], tensor), name
        if name.endswith("embedding.weight"):
            assert torch.equal(whole[name.replace("embedding", "head")], tensor)
    others = {name for name in whole.keys() - live.keys() if not name.endswith("head.weight")}
    assert others == {"parameter.frozen.weight", "buffer.scale", "buffer.count", "client.random"}
    assert whole["parameter.frozen.weight"].dtype == getattr(torch, case.dtype)
    assert whole["buffer.scale"].tolist() == [0.5, 1.5, 2.5]
    assert whole["buffer.count"].item() == 3
    for to_ranks in (1, 2, 5):
        assert_loads_into_any_layout(source, whole, to_ranks)


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_every_tensor_is_what_the_optimizer_held_in_any_layout(saves: Path, case: Case) -> None:
    _check_case(saves / case.name, case, 3)


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_weights_are_those_of_its_own_consolidation(saves: Path, case: Case) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    oracle = get_fp32_state_dict_from_zero_checkpoint(str(saves / case.name))
    whole = load_whole(open_checkpoint(saves / case.name))
    ours = {n.partition(".")[2]: t for n, t in whole.items() if n.startswith(("parameter.", "buffer."))}
    if case.stage == 1:  # it forgets them
        del ours["frozen.weight"]
    assert ours.keys() == oracle.keys()
    for name, tensor in oracle.items():
        assert torch.equal(ours[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_hyper_parameters_go_by_name_and_all_the_rest_is_kept(saves: Path, case: Case) -> None:
    objects: Any = open_checkpoint(saves / case.name).objects
    matrices, vectors = objects["groups"]
    assert matrices["names"] == ["embedding.weight", "up.weight", "down.weight"]
    assert sorted(vectors["names"]) == ["gain", "up.bias"]
    assert [g["settings"]["weight_decay"] for g in (matrices, vectors)] == [0.1, 0.0]
    steps = {"step": STEPS} if case.optimizer == "adamw" else {}
    assert [g["numbers"] for g in (matrices, vectors)] == [steps, steps]
    assert objects["client"] == {"iteration": 3, "args": {"hidden": 5, "sizes": [1, 2]}}
    assert objects["lr_scheduler"] == {"last_batch_iteration": STEPS - 1}
    assert objects["counters"] == {"global_steps": STEPS, "global_samples": 3 * STEPS, "skipped_steps": 0}
    assert objects["scaler"]["loss_scaler"] == {"cur_scale": 1.0, "dynamic": False}
    assert objects["aliases"] == {"head.weight": "embedding.weight"}


@pytest.mark.parametrize("case", [SLICE[0], SLICE[2]], ids=lambda case: case.name)
def test_weights_and_states_go_by_a_table_of_names_into_a_fused_layout(saves: Path, case: Case) -> None:
    """Ours are called otherwise, and two of ours are one of theirs."""
    names = {"tokens": "embedding.weight", "first": "up.weight", "second": "up.weight", "down": "down.weight"}
    shapes = {"tokens": (13, 5), "first": (4, 5), "second": (7, 5), "down": (5, 7)}
    kinds = ("parameter.", "exp_avg.", "exp_avg_sq.")
    naming = with_prefixes(bind(names, shapes, unread=("*",)), kinds, kinds)
    source = open_checkpoint(saves / case.name)
    whole = load_whole(source)
    for kind in kinds:
        up = whole[f"{kind}up.weight"]
        expected = {"first": up[:4], "second": up[4:], "down": whole[f"{kind}down.weight"]}
        for name, tensor in expected.items():
            column, rest = torch.zeros(len(tensor), 2), torch.zeros(tensor.numel() - 3)
            wanted: list[Target] = [(Box((0, 1), (len(tensor), 2)), column), (Interval(3, tensor.numel()), rest)]
            result = load(source, {kind + name: wanted}, names=naming)
            assert torch.equal(column, tensor[:, 1:3])
            assert torch.equal(rest, tensor.flatten()[3:])
            assert result.bytes_read == column.nbytes + rest.nbytes


@pytest.mark.parametrize("case", [SLICE[0], SLICE[2]], ids=lambda case: case.name)
def test_the_universal_form_is_read_like_the_native_one(saves: Path, case: Case) -> None:
    native = saves / case.name / f"global_step{STEPS}"
    convert(native, saves / case.name / "universal")
    ours, atoms = load_whole(open_checkpoint(native)), load_whole(open_checkpoint(saves / case.name / "universal"))
    assert ours.keys() == atoms.keys()  # with the frozen weights and buffers, which its own loader leaves out
    for name, tensor in ours.items():
        assert torch.equal(atoms[name], tensor), name
    objects = [open_checkpoint(path).objects for path in (native, saves / case.name / "universal")]
    assert objects[0]["groups"] == objects[1]["groups"]
    assert objects[0]["client"] == objects[1]["client"]


def convert(source: Path, target: Path) -> None:
    """Make a universal folder of a native one, by the library itself."""
    from deepspeed.checkpoint.ds_to_universal import main

    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    main(argparse.Namespace(input_folder=str(source), output_folder=str(target), inject_missing_state=True, **settings))


def _copy(saves: Path, case: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saves / case.name / f"global_step{STEPS}", tmp_path / "tag"))


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_a_save_that_was_interrupted_is_refused_with_the_reason(saves: Path, case: Case, tmp_path: Path) -> None:
    path = _copy(saves, case, tmp_path)
    (last,) = path.glob("*pp_rank_2_*optim_states.pt")
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(ForeignUnusable, match=r"pp_rank_2.*no file of torch\.save since 1\.6, or damaged"):
        open_checkpoint(path)
    last.unlink()
    with pytest.raises(ForeignUnusable, match=r"saved by 3 ranks, of which the files of 2|files of the model for 2"):
        open_checkpoint(path)
    (first,) = path.glob("*pp_rank_0_*optim_states.pt")
    last.write_bytes(content)
    first.unlink()
    with pytest.raises(ForeignUnusable, match="some lack their files of the optimizer"):
        open_checkpoint(path)


def test_files_of_two_steps_are_not_mixed(saves: Path, tmp_path: Path) -> None:
    path = _copy(saves, SLICE[0], tmp_path)
    (file,) = path.glob("*pp_rank_1_*optim_states.pt")
    state = torch.load(file, weights_only=False)
    for of_group in state["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        of_group["step"] += 1
    torch.save(state, file)
    with pytest.raises(ForeignUnusable, match=r"optimizers of ranks 0 and 1 differ in step of group 0: 2\.0 and 3\.0"):
        open_checkpoint(path)


def test_what_a_client_saved_is_named_if_it_is_no_value_and_nothing_is_executed(saves: Path, tmp_path: Path) -> None:
    path = _copy(saves, SLICE[0], tmp_path)
    file = path / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    state["evil"] = [Evil(tmp_path / "was here")]
    torch.save(state, file)
    source = open_checkpoint(path)
    assert source.left_out == ("client.evil[0]: posix.system", "client.evil: list")
    assert not (tmp_path / "was here").exists()
    load_whole(source)
    state["param_shapes"] = Evil(tmp_path / "was here")
    torch.save(state, file)
    with pytest.raises(ForeignUnusable, match="not as DeepSpeed writes them"):
        open_checkpoint(path)
    assert not (tmp_path / "was here").exists()


def test_a_folder_without_a_checkpoint_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"no manifest\.json, and is no checkpoint of DeepSpeed"):
        open_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(ForeignUnusable, match="no folder beside it"):
        open_checkpoint(tmp_path)


def _mutate(content: bytes, choice: random.Random) -> bytes:
    changed = bytearray(content)
    kind = choice.randrange(4)
    if kind == 0:
        del changed[choice.randrange(len(changed)) :]
    elif kind == 1:
        at = choice.randrange(len(changed))
        changed[at : at + choice.randrange(1, 40)] = choice.randbytes(choice.randrange(40))
    else:
        for _ in range(choice.randrange(1, 6)):
            changed[choice.randrange(len(changed))] = choice.randrange(256)
    return bytes(changed)


def _fuzz(path: Path, rounds: int, seed: int) -> int:
    """Damage a file at a time; every outcome is a clear error or an index whose tensors can be read."""
    choice = random.Random(seed)
    refused = 0
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for _ in range(rounds):
        file = choice.choice(files)
        content = file.read_bytes()
        file.write_bytes(_mutate(content, choice))
        began = time.monotonic()
        reason = refusal(path)
        assert reason is None or str(path) in reason
        refused += reason is not None
        assert time.monotonic() - began < 10
        file.write_bytes(content)
    return refused


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_damaged_files_give_a_clear_error_or_an_index(saves: Path, case: Case, tmp_path: Path) -> None:
    path = _copy(saves, case, tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert _fuzz(path, 60, case.stage) > 0
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parity
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_kind_of_save_is_what_the_optimizer_held(ranks: int, stage: int, optimizer: str, tmp_path: Path) -> None:
    cases = [case for case in WIDE if (case.stage, case.optimizer) == (stage, optimizer)]
    _save(tmp_path, ranks, cases)
    for case in cases:
        _check_case(tmp_path / case.name, case, ranks)


@pytest.mark.parity
def test_thousands_of_damaged_files_give_a_clear_error_or_an_index(saves: Path, tmp_path: Path) -> None:
    for number, case in enumerate(SLICE):
        _fuzz(_copy(saves, case, tmp_path / str(number)), 2000, 100 + number)

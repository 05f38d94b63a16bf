"""``evermesh checkpoint``: what people and programs are told, and the exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from evermesh.checkpoint import Interval, Shard, ShardMap, TensorShards, save
from evermesh.checkpoint.stores.places import Place
from evermesh.launcher.commands.checkpoint import app
from evermesh.launcher.errors import CheckpointRequestInvalid
from tests.checkpoint.states import save_step


def _run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def _json(*arguments: object, code: int = 0) -> Any:
    return json.loads(_run(*arguments, "--json", code=code))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_step(tmp_path_factory.mktemp("ours"), 7)


def test_convert_and_diff_and_verify_and_back(path: Path, tmp_path: Path) -> None:
    told = _json("convert", path, tmp_path / "dcp", "--to", "torch-distributed", "--ranks", 2)
    assert (told["from"], told["to"], told["left_out"]) == ("evermesh", "torch-distributed", [])
    assert told["bytes"] == sum(file.stat().st_size for file in (tmp_path / "dcp").iterdir())
    assert _run("diff", path, tmp_path / "dcp").startswith("the same: ")
    assert _json("verify", tmp_path / "dcp") == {
        "path": str(tmp_path / "dcp"),
        "ok": True,
        "bytes": _json("verify", tmp_path / "dcp")["bytes"],
        "checksums": True,
        "problems": [],
    }
    _run("convert", tmp_path / "dcp", tmp_path / "back", "--to", "evermesh", "--step", 8)
    assert "whole" in _run("verify", tmp_path / "back" / "step-00000008")
    other = save_step(tmp_path / "other", 8)
    told = _json("diff", tmp_path / "back", other, code=1)
    assert not told["same"]
    assert {one["name"] for one in told["differing"]} > {"model.qkv", "optimizer.moment"}
    assert "differs: model.qkv: 1,280 of 1,280 elements" in _run("diff", path, other, code=1)


def test_names_of_the_first_may_be_others_in_the_second(tmp_path: Path) -> None:
    def saved(name: str) -> Place:
        shards = ShardMap({name: TensorShards("float32", (4,), (Shard(Interval(0, 4), (0,)),))})
        return save(tmp_path / name, 1, shards, {name: torch.arange(4.0)}, {})

    table = tmp_path / "names.json"
    table.write_text('{"layers.{n}.w": "model.{n}.weight"}')
    assert _run("diff", saved("layers.3.w"), saved("model.3.weight"), "--names", table).startswith("the same")
    table.write_text("[]")
    done = CliRunner().invoke(
        app, ["diff", *map(str, (saved("layers.3.w"), saved("model.3.weight"), "--names", table))]
    )
    assert isinstance(done.exception, CheckpointRequestInvalid)


def test_extract_tells_what_it_wrote(path: Path, tmp_path: Path) -> None:
    told = _json("extract", path, tmp_path / "a.safetensors", "-t", "model.qkv[0:4, :]", "-t", "model.norm")
    assert told["tensors"] == {
        "model.qkv[0:4, 0:40]": {"dtype": "float32", "shape": [4, 40]},
        "model.norm": {"dtype": "float32", "shape": [96]},
    }


def test_plan_load_adds_up(path: Path) -> None:
    ranks = _json("plan-load", path, "--ranks", 20)["ranks"]
    whole = _json("plan-load", path, "--ranks", 1)["ranks"][0]
    assert sum(one["bytes_needed"] for one in ranks) == whole["bytes_needed"]
    assert "and 4 more ranks" in _run("plan-load", path, "--ranks", 20)
    done = CliRunner().invoke(app, ["plan-load", str(path)])
    assert isinstance(done.exception, CheckpointRequestInvalid)
    assert "--ranks N, or --job JOB.yaml" in str(done.exception)


def test_groups_come_from_a_file(tmp_path: Path) -> None:
    names = [f"{kind}.w" for kind in ("parameter", "exp_avg", "exp_avg_sq")]
    shards = ShardMap({n: TensorShards("float32", (4,), (Shard(Interval(0, 4), (0,)),)) for n in names})
    path = save(tmp_path / "ours", 1, shards, {name: torch.arange(4.0) for name in names}, {})
    file = tmp_path / "groups.json"
    file.write_text('[{"names": ["*"], "settings": {"lr": 0.1, "betas": [0.9, 0.99]}, "numbers": {"step": 1.0}}]')
    _run("convert", path, tmp_path / "z3", "--to", "deepspeed-zero3", "--ranks", 3, "--groups", file)
    shown = _json("show", tmp_path / "z3")
    assert (shown["format"], shown["world_size"], shown["step"]) == ("deepspeed", 3, 1)
    file.write_text("{}")
    done = CliRunner().invoke(
        app, ["convert", str(path), str(tmp_path / "new"), "--to", "deepspeed-zero3", "--groups", str(file)]
    )
    assert isinstance(done.exception, CheckpointRequestInvalid)

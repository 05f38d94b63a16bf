"""Damaged checkpoints of every format give a clear error or can be read: never another exception, much time or memory."""

import copy
import json
import os
import pickle
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from evermesh.checkpoint import ShardMap, TensorShards, save
from evermesh.checkpoint.encoding import MANIFEST, SEAL, sealed
from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.files import DIGITS
from evermesh.checkpoint.foreign.torch_files import Part, read_torch_file
from evermesh.checkpoint.rules import DimCut, FlatCut, RankGrid, ShardingRule
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint.foreign_loads import refusal
from tests.checkpoint.states import QKV, SHAPES, local_storage, logical_state, save_step
from tests.checkpoint.test_megatron_checkpoints import unpacked
from tests.cluster import peak_memory, run_ranks

ROUNDS = 220
"""In each run of the tests, for each format; the long run has ``SOAK``."""
SOAK = int(os.environ.get("MUTATIONS", "100000"))
MOST_S = 10.0
MOST_BYTES = 400 << 20
NASTY: list[Any] = [
    *(-1, 0, 1, 2**31, 2**63 - 1, 2**64, 10**30, -(2**70), 1e308, float("nan")),
    *(True, None, "", "../x", "\0", "float32" * 50, [], {}, [[[[]]]], [10**12], [2**62, 4], [1] * 100, {"a": 1}),
]


def _state() -> dict[str, Any]:
    values = torch.arange(40.0)
    return {"w": values.view(5, 8), "b": values[:7].to(torch.bfloat16), "s": torch.tensor(3), "count": torch.arange(4)}


def _own(folder: Path) -> Path:
    return save_step(folder, 1)


def _own_of_four(folder: Path) -> Path:
    """As trainers save: rules say who holds what, and ranks protect each other."""
    return Path(run_ranks(4, _save_by_rules, str(folder))[0])


def _save_by_rules(rank: int, world_size: int, folder: str) -> str:
    grid, state = RankGrid(0, ((2, 2), (2, 1))), logical_state(1)
    rules = {
        "model.embed": ShardingRule(grid, (DimCut(1, (1,)),)),
        "model.qkv": ShardingRule(grid, (DimCut(0, (0, 1), "up"),)),
        "model.norm": ShardingRule(grid, (), FlatCut((0, 1), 5, 26)),
        "optimizer.moment": ShardingRule(grid, (DimCut(0, (1,)),), FlatCut((0,), 0, 75_000)),
    }
    everywhere = ShardingRule(grid)
    order = {"model.qkv": QKV}
    tensors = {
        name: TensorShards(dtype, shape, rules.get(name, everywhere), permutation=order.get(name))
        for name, (dtype, shape) in SHAPES.items()
    }
    held = {
        name: [local_storage(region, tensor.form, state[name]) for region in tensor.of_rank(rank)]
        for name, tensor in tensors.items()
    }
    tap = Communicator(dist.group.WORLD)
    held = {name: regions for name, regions in held.items() if regions}
    return str(save(Path(folder), 1, ShardMap(tensors), held, {"cursor": 8}, communicator=tap, parity=4))


def _hugging_face(folder: Path) -> Path:
    state = _state()
    names = {"w": "one.safetensors", "b": "two.safetensors", "s": "two.safetensors", "count": "one.safetensors"}
    for file in set(names.values()):
        save_file({name: state[name] for name in state if names[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def _torch(folder: Path) -> Path:
    save_distributed(_state() | {"step": 7, "nested": {"a": [1, "x"]}}, checkpoint_id=folder / "c", no_dist=True)
    return folder / "c"


def _sharded(folder: Path) -> Path:
    writer = HuggingFaceStorageWriter(str(folder / "c"), save_distributed=True)
    save_distributed(_state(), storage_writer=writer, no_dist=True)
    return folder / "c"


def _megatron(folder: Path) -> Path:
    return unpacked("0.13.1", folder) / "iter_0000005"


FORMATS: dict[str, Callable[[Path], Path]] = {
    "evermesh": _own,
    "evermesh of four": _own_of_four,
    "hugging face": _hugging_face,
    "torch": _torch,
    "sharded": _sharded,
    "megatron": _megatron,
}


def _bytes_changed(content: bytes, choice: random.Random) -> bytes:
    changed = bytearray(content)
    kind = choice.randrange(6)
    if kind == 0:
        del changed[choice.randrange(len(changed)) :]
    elif kind == 1:
        at = choice.randrange(len(changed))
        changed[at : at + choice.randrange(1, 40)] = choice.randbytes(choice.randrange(40))
    elif kind == 2:  # lengths and numbers of four or eight bytes
        at = choice.randrange(len(changed))
        width = choice.choice((4, 8))
        changed[at : at + width] = choice.choice((0xFF, 0x7F, 0x00)).to_bytes(1, "big") * width
    else:
        for _ in range(choice.randrange(1, 6)):
            changed[choice.randrange(len(changed))] = choice.randrange(256)
    return bytes(changed)


def _value_changed(value: Any, choice: random.Random) -> Any:
    """A copy in which one value, chosen anywhere inside, is another."""
    if isinstance(value, dict) and value and choice.random() < 0.95:
        key = choice.choice(list(value))
        if choice.random() < 0.05:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _value_changed(value[key], choice)}
    if isinstance(value, list | tuple) and value and choice.random() < 0.95:
        at = choice.randrange(len(value))
        changed = [_value_changed(v, choice) if index == at else v for index, v in enumerate(value)]
        return tuple(changed) if isinstance(value, tuple) else changed
    return copy.deepcopy(choice.choice(NASTY))


def _json_changed(content: bytes, choice: random.Random) -> bytes:
    if choice.random() < 0.02:
        return b"[" * 200_000
    return json.dumps(_value_changed(json.loads(content), choice)).encode()


def _header_changed(content: bytes, choice: random.Random) -> bytes:
    """Of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    notes = header.get("__metadata__", {})
    if notes.get("DCP_SHARDING_INFO") and choice.random() < 0.5:
        places = _value_changed(json.loads(notes["DCP_SHARDING_INFO"]), choice)
        header["__metadata__"] = notes | {"DCP_SHARDING_INFO": json.dumps(places)}
        changed = json.dumps(header).encode()
    else:
        changed = _json_changed(json.dumps(header).encode(), choice)
    return len(changed).to_bytes(8, "little") + changed + content[8 + length :]


def _manifest_changed(content: bytes, choice: random.Random) -> bytes:
    """With the checksum of what it is now."""
    body = json.loads(b"{" + content[len(SEAL) + DIGITS + 2 :])
    changed = _value_changed(body, choice)
    return sealed(changed) if isinstance(changed, dict) else json.dumps(changed).encode()


def _index_changed(file: Path, contents: Mapping[Path, bytes], choice: random.Random) -> dict[Path, bytes]:
    """With the checksum of what it is now, also in the manifest: whoever can write a checkpoint can make both."""
    line, rest = contents[file].splitlines()
    head, body = json.loads(line), json.loads(rest)
    if choice.random() < 0.8:
        body = _value_changed(body, choice)
    rest = json.dumps(body).encode()
    head |= {"rest": xxhash.xxh3_64_hexdigest(rest), "rest_bytes": len(rest)}
    if choice.random() < 0.3:
        head = _value_changed(head, choice)
    line = json.dumps(head).encode() + b"\n"
    manifest = json.loads(contents[file.parent / MANIFEST])
    del manifest["xxh3_64"]
    told = {"xxh3_64": xxhash.xxh3_64_hexdigest(line), "num_bytes": len(line) + len(rest)}
    of_rank = manifest["ranks"][int(file.stem.removeprefix("rank-"))]
    of_rank |= told
    return {file: line + rest, file.parent / MANIFEST: sealed(manifest)}


def _metadata_changed(content: bytes, choice: random.Random) -> bytes:
    """Of torch: one attribute of one object in it is another."""
    metadata = pickle.loads(content)  # noqa: S301
    entries = [*metadata.state_dict_metadata.values(), *metadata.storage_data.values(), *metadata.storage_data]
    chunks = [chunk for entry in entries for chunk in getattr(entry, "chunks", ())]
    target = choice.choice([*entries, *chunks])
    names = [name for name in vars(target) if name != "properties"]
    if names:
        name = choice.choice(names)
        old = getattr(target, name)
        object.__setattr__(target, name, _value_changed(tuple(old) if isinstance(old, torch.Size) else old, choice))
    return pickle.dumps(metadata)


def _damaged(file: Path, contents: Mapping[Path, bytes], choice: random.Random) -> dict[Path, bytes]:
    """What files hold then. Half of the time the bytes are changed, half the values that they stand for."""
    content = contents[file]
    if not content or choice.random() < 0.5:
        return {file: _bytes_changed(content or b"\0", choice)}
    if file.suffix == ".index" and file.name.startswith("rank-"):
        return _index_changed(file, contents, choice)
    return {file: _with_other_values(file, content, choice)}


def _with_other_values(file: Path, content: bytes, choice: random.Random) -> bytes:
    if file.name == MANIFEST:
        return _manifest_changed(content, choice)
    if file.suffix == ".json":
        return _json_changed(content, choice)
    if file.suffix == ".safetensors":
        return _header_changed(content, choice)
    if file.name == ".metadata" and b"megatron" not in content:
        try:
            return _metadata_changed(content, choice)
        except TypeError:  # no longer a key
            pass
    return _bytes_changed(content, choice)


def fuzz(path: Path, rounds: int, seed: int) -> int:
    """Damage a file at a time; returns how often the checkpoint was refused."""
    choice, refused = random.Random(seed), 0
    contents = {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    described = [
        file
        for file in contents
        if file.suffix in (".json", ".safetensors", ".pt", ".index") or file.name == ".metadata"
    ]
    with peak_memory() as peak:
        for round_ in range(rounds):
            file = choice.choice(described if choice.random() < 0.7 else list(contents))
            damaged = _damaged(file, contents, choice)
            for one, payload in damaged.items():
                one.write_bytes(payload)
            began = time.monotonic()
            try:
                reason = refusal(path)
            except BaseException as error:
                kept = path.parent / "found"
                kept.mkdir()
                for one in damaged:
                    shutil.copy(one, kept)
                raise AssertionError(
                    f"seed {seed}, round {round_}, {file.name}, kept as {kept}: {error!r:.300}"
                ) from error
            assert reason is None or str(path) in reason
            assert time.monotonic() - began < MOST_S
            refused += reason is not None
            for one in damaged:
                one.write_bytes(contents[one])
    assert peak.num_bytes < MOST_BYTES
    return refused


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", FORMATS)
def test_damage_gives_a_clear_error_or_an_index(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path)
    assert refusal(path) is None
    assert fuzz(path, ROUNDS, 1) > ROUNDS // 5


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", FORMATS)
def test_a_hundred_thousand_times(name: str, tmp_path: Path) -> None:
    refused = fuzz(FORMATS[name](tmp_path), SOAK // len(FORMATS), 7)
    print(f"{name}: {refused:,} of {SOAK // len(FORMATS):,} were refused")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(200 << 20))
    with peak_memory() as peak, pytest.raises(ForeignUnusable, match="compressed or encrypted"):
        read_torch_file(Part(tmp_path / "bomb.pt"))
    assert peak.num_bytes < 20 << 20


def test_a_zip_with_very_many_entries_is_read_in_bounded_time(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "many.pt", "w") as archive:
        for index in range(20_000):
            archive.writestr(f"a/data/{index}", b"")
    began = time.monotonic()
    with pytest.raises(ForeignUnusable, match=r"not one data\.pkl"):
        read_torch_file(Part(tmp_path / "many.pt"))
    assert time.monotonic() - began < MOST_S


@pytest.mark.parametrize("size", [10**12, 2**40, 2**63, 2**200])
def test_a_shape_that_no_file_can_hold_is_refused_before_memory_is_asked_for(size: int, tmp_path: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
    payload = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(payload).to_bytes(8, "little") + payload + bytes(64))
    reason = refusal(tmp_path)
    assert reason is not None
    assert "is said to be in bytes 0 to" in reason


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("size", [10**12, 2**63, 2**200, -4, "many"])
def test_chunks_that_no_file_can_hold_are_refused(size: Any, tmp_path: Path) -> None:
    path = _torch(tmp_path)
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())  # noqa: S301
    chunk = metadata.state_dict_metadata["w"].chunks[0]
    object.__setattr__(chunk, "sizes", (size, 8))
    object.__setattr__(metadata.state_dict_metadata["w"], "size", (size, 8))
    file.write_bytes(pickle.dumps(metadata))
    reason = refusal(path)
    assert reason is not None
    assert "it is not as torch writes it" in reason

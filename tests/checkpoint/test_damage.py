"""Random damage to the files of several ranks: all of it is found, named by file, tensor and elements, and none is loaded.

The slice of every run is small; ``make soak-saving`` does it ten thousand times (DAMAGES says how many).
"""

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evermesh.checkpoint import (
    Box,
    CheckpointCorrupt,
    CheckpointNotFound,
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
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.format import MANIFEST, Extent
from evermesh.parallelism.collectives import Communicator
from tests.cluster import run_ranks

_RANKS = 3
_DAMAGES = int(os.environ.get("DAMAGES", "10000"))
_ELEMENTS = re.compile(r"(\w+)(\[[^]]*\]) elements ([\d,]+) to ([\d,]+)")

Damage = Callable[[Path, random.Random, Path], str]
"""Damages a file (or it and the other one), and says how."""


def _map() -> ShardMap:
    third = 600_000
    intervals = tuple(Shard(Interval(rank * third, (rank + 1) * third), (rank,)) for rank in range(_RANKS))
    columns = tuple(Shard(Box((0, rank * 256), (900, 256)), (rank,)) for rank in range(_RANKS))
    whole = (Shard(Box((0,), (150_000,)), tuple(range(_RANKS))),)
    return ShardMap(
        {
            "moment": TensorShards("float32", (_RANKS * third,), intervals),
            "weight": TensorShards("bfloat16", (900, _RANKS * 256), columns),
            "count": TensorShards("int64", (150_000,), whole),
        }
    )


def _held(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        "moment": torch.randn(600_000, generator=generator),
        "weight": torch.randn(900, 256, generator=generator).to(torch.bfloat16),
        "count": torch.arange(150_000) * 7,
    }


def _save(rank: int, size: int, directory: str) -> str:
    return str(save(directory, 1, _map(), _held(rank), {}, communicator=Communicator(dist.group.WORLD)))


def _flip(file: Path, choice: random.Random, other: Path) -> str:
    content = bytearray(file.read_bytes())
    at = choice.randrange(len(content))
    content[at] ^= 1 << choice.randrange(8)
    file.write_bytes(content)
    return f"byte {at}"


def _overwrite(file: Path, choice: random.Random, other: Path) -> str:
    """A page or a sector that holds something else, as failing disks and stray writes leave it."""
    content = bytearray(file.read_bytes())
    at = choice.randrange(len(content))
    length = min(choice.choice([512, 4096]), len(content) - at)
    before = bytes(content[at : at + length])
    content[at : at + length] = bytes(length) if choice.random() < 0.5 and any(before) else choice.randbytes(length)
    file.write_bytes(content)
    return f"byte {at}"


def _shift(file: Path, choice: random.Random, other: Path) -> str:
    """The bytes behind a place move by a few: the length stays."""
    content = file.read_bytes()
    at, by = choice.randrange(len(content) // 2), choice.randrange(1, 9)
    file.write_bytes(content[:at] + choice.randbytes(by) + content[at:-by])
    return "shifted"


def _truncate(file: Path, choice: random.Random, other: Path) -> str:
    with file.open("r+b") as opened:
        opened.truncate(choice.randrange(file.stat().st_size))
    return "truncated"


def _lengthen(file: Path, choice: random.Random, other: Path) -> str:
    with file.open("ab") as opened:
        opened.write(choice.randbytes(choice.randrange(1, 5000)))
    return "lengthened"


def _lose(file: Path, choice: random.Random, other: Path) -> str:
    file.unlink()
    return "lost"


def _swap(file: Path, choice: random.Random, other: Path) -> str:
    """Two ranks' files of one kind in each other's place."""
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)
    return "swapped"


_DAMAGE: dict[Damage, int] = {_flip: 6, _overwrite: 3, _shift: 1, _truncate: 2, _lengthen: 1, _lose: 1, _swap: 2}
"""Kinds with their weights."""


def _placed(text: str, name: str, extent: Extent, position: int) -> bool:
    """Whether a problem names the element that is stored at a position of a file."""
    element = extent.start + (position - extent.offset) // DTYPES[_map().tensors[name].dtype].num_bytes
    for tensor, region, first, last in _ELEMENTS.findall(text):
        if (tensor, region) == (name, str(extent.region)):
            return int(first.replace(",", "")) <= element < int(last.replace(",", ""))
    return False


def _check_found(path: Path, file: Path, how: str, extents: Mapping[str, list[tuple[str, Extent]]]) -> None:
    """What ``verify`` tells names the file, and the tensor and elements that a changed byte belongs to."""
    if (file.name, how) == (MANIFEST, "lost"):
        with pytest.raises(CheckpointNotFound, match=f"it has no {MANIFEST}"):
            verify(path)
        return
    problems = [problem for problem in verify(path).problems if problem.file == file.name]
    assert problems, (file, how)
    if not how.startswith("byte ") or file.name not in extents:
        return
    position = int(how.removeprefix("byte "))
    for name, extent in extents[file.name]:
        end = extent.offset + (extent.stop - extent.start) * DTYPES[_map().tensors[name].dtype].num_bytes
        if extent.offset <= position < end:
            assert any(_placed(problem.text, name, extent, position) for problem in problems), (file, how, problems)


def _num_refused(path: Path) -> int:
    """Ranks that were refused what they asked for; the others got it bit for bit."""
    refused = 0
    for rank in range(_RANKS):
        expected = _held(rank)
        got = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        try:
            load(path, wanted_regions(_map(), rank, got), shard_map=_map())
        except (CheckpointCorrupt, CheckpointNotFound):
            refused += 1
        else:
            assert all(torch.equal(got[name], tensor) for name, tensor in expected.items()), rank
    return refused


def _damage_often(path: Path, times: int, seed: int) -> Counter[str]:
    """Damage the checkpoint, look, and mend it again, so many times; by kind how often."""
    source, choice = open_checkpoint(path), random.Random(seed)
    extents: dict[str, list[tuple[str, Extent]]] = {}
    for name, tensor in source.tensors.items():
        for extent in tensor.extents:
            extents.setdefault(extent.file, []).append((name, extent))
    contents = {file: file.read_bytes() for file in sorted(path.iterdir())}
    of_ranks = [file for file in contents if file.name.startswith("rank-")]
    counts: Counter[str] = Counter()
    for _ in range(times):
        kind = choice.choices(list(_DAMAGE), list(_DAMAGE.values()))[0]
        file = choice.choice(of_ranks if kind is _swap else list(contents))
        other = choice.choice([o for o in of_ranks if o.suffix == file.suffix and o != file] or [file])
        how = kind(file, choice, other)
        if {f: f.read_bytes() if f.exists() else None for f in (file, other)} != {
            f: contents[f] for f in (file, other)
        }:
            _check_found(path, file, how, extents)
            assert _num_refused(path) > 0, (file, how)
            counts[kind.__name__.removeprefix("_")] += 1
        for touched in (file, other):
            touched.write_bytes(contents[touched])
    assert verify(path).ok
    assert _num_refused(path) == 0
    return counts


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return Path(run_ranks(_RANKS, _save, str(tmp_path))[0])


def test_random_damage_is_found_and_placed_and_not_loaded(saved: Path) -> None:
    assert len(_damage_often(saved, 60, 1)) >= 6


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_ten_thousand_damages_are_found_and_placed_and_none_is_loaded(saved: Path) -> None:
    print(dict(_damage_often(saved, _DAMAGES, 2)))

"""Bits flip in what keepers hold: data, indexes, objects, headers, parity, records. Every flip is found, and all that the
code covers are repaired; ``make soak`` flips 10,000 (FLIPS)."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from evermesh.fault.snapshot.choosing import Version
from evermesh.fault.snapshot.keeper.parity import buffer_of
from evermesh.fault.snapshot.keeper.sealing import rotten_chunks
from evermesh.fault.snapshot.keeper.slots import HEADER_USED_BYTES, SlotFiles, held_by
from tests.fault.snapshot.stripe_keepers import Stripe, stripe_of

MIB = 1 << 20
SIZES = ((2 * MIB + 5, 4097), (MIB, 0), (3 * MIB - 7, 1))
_MOST_AT_ONCE = 12


class _Flip(NamedTuple):
    node: int
    file: Path
    at: int
    bit: int
    chunk: int | None
    """Of the data of a slot: the MiB in which it lies."""


def _files(stripe: Stripe, node: int, version: Version) -> Iterator[Path]:
    """All that a node holds of a snapshot."""
    area = stripe.area(node)
    for rank in stripe.ranks[node]:
        for held in held_by(area, rank):
            if held.record.version == version:
                files = SlotFiles.of(area, rank, held.number)
                yield from (file for file in (files.header, files.data, files.index, files.objects) if file.is_file())
    yield from (_parity(stripe, node, version).with_name(name) for name in ("parity", "record", "protected"))


def _parity(stripe: Stripe, node: int, version: Version) -> Path:
    buffer = buffer_of(stripe.area(node), version)
    assert buffer is not None
    return buffer._folder / "parity"


def _draw(rng: random.Random, stripe: Stripe, version: Version, most: int) -> list[_Flip]:
    """Different bytes of at most ``most`` members, files by turns, so that small ones are met as often as large ones."""
    flips: dict[tuple[Path, int], _Flip] = {}
    nodes = rng.sample(range(3), rng.randint(1, most))
    files = [(node, file) for node in nodes for file in _files(stripe, node, version)]
    for _ in range(rng.randint(1, _MOST_AT_ONCE)):
        node, file = rng.choice(files)
        at = _place(rng, file)
        if at is not None:
            is_data = file.suffix == ".safetensors"
            flips[file, at] = _Flip(node, file, at, rng.randrange(8), at // MIB if is_data else None)
    return list(flips.values())


def _place(rng: random.Random, file: Path) -> int | None:
    """A byte that means something: in a header not the ticket of the copy under way, which is no part of a snapshot; of
    parity one that is not zero, for the rest of its buffer is."""
    content = file.read_bytes()
    if file.name == "header":
        return rng.choice([*range(8), *range(64, HEADER_USED_BYTES)])
    if file.name == "parity":
        drawn = (rng.randrange(len(content)) for _ in range(1000))
        return next((at for at in drawn if content[at]), None)
    return rng.randrange(len(content)) if content else None


def _spoil(flips: list[_Flip]) -> None:
    for flip in flips:
        with flip.file.open("r+b") as opened:
            opened.seek(flip.at)
            before = opened.read(1)[0]
            opened.seek(flip.at)
            opened.write(bytes([before ^ 1 << flip.bit]))


def _is_seen_by_the_scrubber(flips: list[_Flip]) -> bool:
    """Every MiB of data with a flip is named by who looks for rot, where header and index can be read."""
    spoiled = {flip.file.parent for flip in flips if flip.chunk is None}
    for flip in flips:
        if flip.chunk is not None and flip.file.parent not in spoiled:
            folder = flip.file.parent
            rank, slot = int(folder.parent.name.removeprefix("rank-")), int(folder.name.removeprefix("slot-"))
            files = SlotFiles.of(folder.parents[1], rank, slot)
            if flip.chunk not in rotten_chunks(files, lambda _: None):
                return False
    return True


def _rebuild(stripe: Stripe, version: Version) -> set[int]:
    """The members in which something was wrong, as all of them tell."""
    stripe.join()
    found = [{*answer.get("lost", ()), *map(int, answer.get("repaired", ()))} for answer in stripe.rebuild(version)]
    assert found[1:] == found[:-1]
    return found[0]


def _flip_and_repair(folder: Path, code: str, number: int, seed: int) -> int:
    """Until that many were flipped, all of them found and repaired; how many they were."""
    rng, flipped = random.Random(seed), 0
    with stripe_of(folder, code, SIZES) as stripe:
        version = stripe.protect(4)
        whole = stripe.digests(version)
        before = {node: _parity(stripe, node, version).read_bytes() for node in range(3)}
        while flipped < number:
            flips = _draw(rng, stripe, version, int(code[-1]))
            _spoil(flips)
            assert _is_seen_by_the_scrubber(flips), flips
            assert _rebuild(stripe, version) == {flip.node for flip in flips}, flips
            assert stripe.digests(version) == whole, flips
            assert {node: _parity(stripe, node, version).read_bytes() for node in range(3)} == before, flips
            flipped += len(flips)
    return flipped


@pytest.mark.parametrize("code", ["2+1", "1+2"])
def test_f19_f20_f21_every_flip_is_found_and_repaired(tmp_path: Path, code: str) -> None:
    assert _flip_and_repair(tmp_path, code, 60, seed=1) >= 60


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_f19_f20_f21_of_10_000_flips_each_is_found_and_repaired(tmp_path: Path) -> None:
    number, flipped = int(os.environ.get("FLIPS", "10000")), 0
    for seed, code in enumerate(("2+1", "1+2")):
        (tmp_path / code).mkdir()
        flipped += _flip_and_repair(tmp_path / code, code, number // 2, seed)
    print(f"\n{flipped:,} flipped, found and repaired")

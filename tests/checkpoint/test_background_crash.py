"""A writer that is killed at any system call, or whose trainer is, leaves the previous checkpoint or the new one, whole."""

import itertools
import multiprocessing
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.killing import NEW_STATE, OLD_STATE, Kill, next_save_works, state_of_latest
from tests.checkpoint.states import save_step
from tests.checkpoint.writers import Orphan, write_state

_EVERY_CALL = [(step, kind) for step in (1, 2) for kind in (Kill, Orphan)]
_POINTS, _FIRST = int(os.environ.get("POINTS", "10000")), int(os.environ.get("FIRST", "0"))


def _in_one_thread(function: Any, *arguments: Any) -> Any:
    """The result of ``function`` in a process that may fork."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(target=_send, args=(sender, function, *arguments))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def _send(sender: Any, function: Any, *arguments: Any) -> None:
    sender.send(function(*arguments))


def _die_at_every_call(base: Path, step: int, kind: type[Kill], every: int) -> list[tuple[bool, Path]]:
    """Whether a commit was told, and what is left, for a kill at every so many calls of one writer, to its end."""
    found = []
    for call in itertools.count(0, every):
        directory = Path(shutil.copytree(base, base.parent / f"{kind.__name__}-{call}"))
        told = write_state(directory, step, NEW_STATE, 1, {0: kind(call, half=kind is Kill)})
        found.append((told, directory))
        if told and len(found) > 60 // every:
            return found
    raise AssertionError("the writer has endlessly many calls")


@pytest.mark.parametrize(
    ("step", "kind", "every"),
    [
        (2, Kill, 2),
        (1, Kill, 3),
        (2, Orphan, 3),
        *(pytest.param(s, k, 1, marks=pytest.mark.soak) for s, k in _EVERY_CALL),
    ],
)
def test_a_writer_that_dies_or_loses_its_trainer_at_any_call_leaves_the_old_or_the_new_checkpoint(
    step: int, kind: type[Kill], every: int, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_step(base, 1, state=OLD_STATE)
    found = _in_one_thread(_die_at_every_call, base, step, kind, every)
    states = []
    for told, directory in found:
        states.append(state_of_latest(directory))
        assert states[-1] == NEW_STATE or not told
        next_save_works(directory)
    assert states == sorted(states)
    assert set(states) == {OLD_STATE, NEW_STATE}


def _die_somewhere(base: Path, points: int, seed: int) -> list[tuple[int, bool, Path]]:
    """Several writers, one or two of which die at random calls."""
    choice = random.Random(seed)
    found = []
    for point in range(points):
        directory = Path(shutil.copytree(base, base.parent / f"somewhere-{seed}-{point}"))
        size = choice.choice([1, 2, 3])
        dying = choice.sample(range(size), choice.choice([1, min(2, size)]))
        kinds = (Kill, Orphan)
        kills: dict[int, Kill] = {}
        for rank in dying:
            kind = choice.choice(kinds)  # a writer that only lost its trainer never writes half of anything
            kills[rank] = kind(choice.randrange(42 if rank == 0 else 18), half=kind is Kill)
        told = write_state(directory, choice.choice([1, 2]), NEW_STATE, size, kills, choice.choice([None, 1, 2]))
        found.append((point, told, directory))
    return found


def _check_somewhere(base: Path, points: int, seed: int) -> set[int]:
    found = set()
    for point, told, directory in _in_one_thread(_die_somewhere, base, points, seed):
        state = state_of_latest(directory)
        assert state == NEW_STATE or not told, point
        next_save_works(directory)
        shutil.rmtree(directory)
        found.add(state)
    return found


def test_writers_of_several_ranks_that_die_anywhere_leave_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path / "base", 1, state=OLD_STATE)
    assert OLD_STATE in _check_somewhere(tmp_path / "base", 12, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_thousands_of_writers_that_die_anywhere(tmp_path: Path) -> None:
    save_step(tmp_path / "base", 1, state=OLD_STATE)
    found = set()
    for seed in range(_FIRST // 100, -(-(_FIRST + _POINTS) // 100)):
        found |= _check_somewhere(tmp_path / "base", 100, seed)
    assert found == {OLD_STATE, NEW_STATE}

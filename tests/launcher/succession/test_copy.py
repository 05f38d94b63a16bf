"""A copy of the journal on disk: torn, changed and replaced; only what was there whole is read again."""

from pathlib import Path

import pytest

from evermesh.launcher.succession.copy import EMPTY, Chain, DiskCopy, read_copy

LINES = [f'{{"seq": {number}, "text": "ü\\u2028 {number}"}}' for number in range(1, 6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "copy.jsonl"
    copy = DiskCopy(path)
    for number, line in enumerate(LINES):
        copy.write(number, [line])
    copy.close()
    return path


def test_what_was_written_is_there_again_with_its_digests(path: Path) -> None:
    copy = DiskCopy(path)
    assert copy.chain.lines == LINES == read_copy(path)
    assert [copy.chain.digest(number) for number in range(6)] == [
        Chain(LINES[:number]).digest(number) for number in range(6)
    ]
    copy.close()


def test_wherever_the_last_line_is_torn_the_others_are_read_and_it_can_be_written_again(path: Path) -> None:
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        assert read_copy(path) == LINES[:-1]
    copy = DiskCopy(path)
    copy.write(4, LINES[4:])
    copy.close()
    assert path.read_bytes() == whole


def test_nothing_behind_a_changed_byte_is_believed(path: Path) -> None:
    whole = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for position in range(len(whole)):
        for bit in (0, 5):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            path.write_bytes(bytes(changed))
            found = read_copy(path)
            before = sum(end <= position for end in ends)
            assert found == LINES[: len(found)]
            assert len(found) == before or (
                len(found) == 5 and bytes(changed) != whole and _same(whole, bytes(changed))
            )


def _same(one: bytes, other: bytes) -> bool:
    """Whether they differ in the case of the digits of an escape alone, which mean the same."""
    return one.lower() == other.lower()


def test_a_line_that_another_replaces_takes_those_behind_it_with_it(path: Path) -> None:
    copy = DiskCopy(path)
    copy.write(2, ["another", "and another"])
    assert copy.chain.lines == [*LINES[:2], "another", "and another"]
    copy.close()
    assert read_copy(path) == [*LINES[:2], "another", "and another"]


def test_a_copy_with_another_beginning_has_another_digest() -> None:
    assert Chain(["a", "b"]).digest(2) != Chain(["c", "b"]).digest(2)
    assert Chain(["a", "b"]).digest(0) == EMPTY
    assert Chain(["ab"]).digest(1) != Chain(["a", "b"]).digest(2)


def test_lines_that_are_there_already_are_found() -> None:
    chain = Chain(LINES)
    assert chain.agreeing(0, LINES) == 5
    assert chain.agreeing(3, [LINES[3], "x"]) == 1
    assert chain.agreeing(3, ["x"]) == 0
    assert chain.agreeing(5, ["x"]) == 0
    assert chain.agreeing(4, [LINES[4], "x"]) == 1

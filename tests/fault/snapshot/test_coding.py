"""Parity and decoded parts against arithmetic done bit by bit, and the engines against each other."""

import hashlib
import itertools
import shutil
import subprocess
import sys
from base64 import urlsafe_b64encode
from functools import reduce
from importlib.metadata import PackagePath
from operator import xor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.fault.snapshot.coding import (
    Code,
    CodeImpossible,
    Coder,
    TooManyErasures,
    choose_engine,
    isal,
    staggered_buffers,
)
from evermesh.fault.snapshot.coding.engine import Engine, NumpyEngine
from evermesh.fault.snapshot.coding.errors import EngineUnusable

CODES = [Code(data, parity) for data in range(1, 9) for parity in (1, 2, 3)]


def _multiply(first: int, second: int) -> int:
    """The product as schoolbooks make it: shifted copies, then the polynomial taken away from the top."""
    total = 0
    for bit in range(8):
        if second >> bit & 1:
            total ^= first << bit
    for bit in range(14, 7, -1):
        if total >> bit & 1:
            total ^= 0x11D << (bit - 8)
    return total


def _inverse(element: int) -> int:
    return next(other for other in range(256) if _multiply(element, other) == 1)


def _coefficient(code: Code, row: int, column: int) -> int:
    if code.parity <= 2:
        return reduce(_multiply, [2 * row or 1] * column, 1)  # 1 in P, 2^j in Q
    return _inverse((code.data + row) ^ column)


def _brute_parity(code: Code, data: list[bytes]) -> list[bytes]:
    length = max(map(len, data))
    padded = [part.ljust(length, b"\0") for part in data]
    return [
        bytes(
            reduce(xor, (_multiply(_coefficient(code, row, at), part[place]) for at, part in enumerate(padded)))
            for place in range(length)
        )
        for row in range(code.parity)
    ]


def _random_bytes(seed: int, *lengths: int) -> list[bytes]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, length, np.uint8).tobytes() for length in lengths]


@pytest.fixture(params=["numpy", "isal"])
def engine(request: pytest.FixtureRequest) -> Engine:
    try:
        return choose_engine(request.param).engine
    except EngineUnusable as error:
        pytest.skip(str(error))


def _encode(coder: Coder, data: list[bytes]) -> list[bytes]:
    parity = [bytearray(max(map(len, data))) for _ in range(coder.code.parity)]
    coder.encode(data, parity)
    return [bytes(part) for part in parity]


@pytest.mark.parametrize("code", CODES, ids=str)
def test_parity_is_what_arithmetic_by_bits_says(code: Code, engine: Engine) -> None:
    data = _random_bytes(code.parts, *(19 + 3 * at for at in range(code.data)))
    assert _encode(Coder(code, engine), data) == _brute_parity(code, data)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_every_loss_of_as_many_parts_as_there_is_parity_is_made_good(code: Code, engine: Engine) -> None:
    data = _random_bytes(code.parts, *(23 - 2 * at for at in range(code.data)))
    coder = Coder(code, engine)
    whole = [*data, *_encode(coder, data)]
    for number in range(1, code.parity + 1):
        for lost in itertools.combinations(range(code.parts), number):
            found = {part: bytearray(len(whole[part])) for part in lost}
            coder.decode({part: whole[part] for part in range(code.parts) if part not in lost}, found)
            assert {part: bytes(made) for part, made in found.items()} == {part: whole[part] for part in lost}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_lengths_and_the_order_of_blocks_do_not_matter(drawn: st.DataObject) -> None:
    code = Code(drawn.draw(st.integers(1, 8)), drawn.draw(st.integers(1, 4)))
    lengths = drawn.draw(st.lists(st.integers(0, 200_000), min_size=code.data, max_size=code.data))
    data = _random_bytes(sum(lengths), *lengths)
    longest = max(lengths)
    padded = [part.ljust(longest, b"\0") for part in data]
    for name in ("numpy", "auto"):
        coder = Coder(code, choose_engine(name).engine)
        parity = _encode(coder, data)
        assert parity == _encode(coder, padded)
        size = drawn.draw(st.integers(1 + longest // 7, 1 + longest))
        blocks = [(at, start) for at in range(code.data) for start in range(0, lengths[at], size)]
        summed = [bytearray(longest) for _ in range(code.parity)]
        for at, start in drawn.draw(st.permutations(blocks)):
            coder.update(at, start, data[at][start : start + size], summed)
        assert [bytes(part) for part in summed] == parity


def test_a_part_is_decoded_out_of_buffers_larger_than_a_chunk(engine: Engine) -> None:
    data = _random_bytes(5, (2 << 20) + 17, 1 << 20, (1 << 20) + 1, 3)
    coder = Coder(Code(4, 3), engine)
    parity = _encode(coder, data)
    found = {part: bytearray(len(data[part])) for part in (0, 2, 3)}
    coder.decode({1: data[1], 4: parity[0], 5: parity[1], 6: parity[2]}, found)
    assert {part: bytes(made) for part, made in found.items()} == {part: data[part] for part in found}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 100_000))
def test_engines_agree_bit_for_bit(data: int, parity: int, length: int) -> None:
    fast = choose_engine("auto").engine
    if fast.name != "isal":
        pytest.skip(choose_engine("auto").why_not_better or "")
    parts = _random_bytes(length, *[length] * data)
    code = Code(data, parity)
    assert _encode(Coder(code, fast), parts) == _encode(Coder(code, NumpyEngine()), parts)


@pytest.mark.parametrize("data", range(2, 9))
def test_p_and_q_are_those_of_isal_pq_gen(data: int) -> None:
    import ctypes

    choice = choose_engine("auto")
    if choice.engine.name != "isal":
        pytest.skip(choice.why_not_better or "")
    block = np.random.default_rng(data).integers(0, 256, ((data + 2), 4096), np.uint8)
    aligned = staggered_buffers(data + 2, 4096)
    for buffer, row in zip(aligned, block, strict=True):
        buffer[:] = row.data
    addresses = [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in aligned]
    assert ctypes.CDLL(choice.where).pq_gen(data + 2, 4096, (ctypes.c_void_p * (data + 2))(*addresses)) == 0
    parity = _encode(Coder(Code(data, 2), NumpyEngine()), [row.tobytes() for row in block[:data]])
    assert parity == [bytes(buffer) for buffer in aligned[data:]]


def test_more_losses_than_parity_are_refused_with_both_numbers() -> None:
    with pytest.raises(TooManyErasures, match="3 parts are lost or corrupt, but 2 parity parts") as caught:
        Coder(Code(4, 2), NumpyEngine()).decode({0: b"a", 1: b"b", 5: b"c"}, {2: bytearray(1)})
    assert (caught.value.lost, caught.value.tolerated) == (3, 2)


@pytest.mark.parametrize("text", ["6", "6+0", "0+2", "254+3", "254+2", "a+b", "6+2+1", "+2"])
def test_a_code_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(CodeImpossible):
        Code.parse(text)


def test_the_widest_codes_decode() -> None:
    for code in (Code(253, 2), Code(253, 3)):
        data = _random_bytes(code.parts, *[5] * code.data)
        coder = Coder(code, NumpyEngine())
        parts = dict(enumerate([*data, *_encode(coder, data)]))
        found = {part: bytearray(5) for part in range(7, 7 + code.parity)}
        coder.decode({at: part for at, part in parts.items() if at not in found}, found)
        assert all(bytes(found[part]) == parts[part] for part in found)


def test_an_engine_that_computes_wrong_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    working = choose_engine("auto")
    if working.engine.name != "isal":
        pytest.skip(working.why_not_better or "")

    def reversed_rows(self: isal.IsalEngine, rows: object, sources: object, outputs: object) -> None:
        original(self, rows, sources, outputs[::-1])  # type: ignore

    original = isal.IsalEngine.combine
    monkeypatch.setattr(isal.IsalEngine, "combine", reversed_rows)
    with pytest.raises(EngineUnusable, match=r"computes wrong parity for 6\+2"):
        isal.load()


def test_a_library_that_is_not_the_installed_one_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the interpreter stands for a file that somebody put in place of ISA-L."""
    file = tmp_path / "libisal-x.so.2"
    shutil.copy(sys.executable, file)
    right = urlsafe_b64encode(hashlib.sha256(b"what was installed").digest()).rstrip(b"=").decode()
    recorded = PackagePath(file.name)
    recorded.hash = SimpleNamespace(mode="sha256", value=right)  # type: ignore[assignment]
    recorded.dist = SimpleNamespace(locate_file=lambda path: tmp_path / path)  # type: ignore[assignment]
    monkeypatch.setattr(isal, "SYSTEM_LIBRARY", "libisal-not-there.so.2")
    monkeypatch.setattr(isal, "files", lambda name: [recorded])
    with pytest.raises(EngineUnusable, match="is not the file that pyeclib installed"):
        isal.load()


def test_without_isal_numpy_computes_and_the_report_says_why() -> None:
    program = """
from evermesh.fault.snapshot.coding import isal, choose_engine
isal.SYSTEM_LIBRARY, isal.WHEEL = "libisal-not-there.so.2", "no-such-wheel"
print(choose_engine())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("erasure codes: numpy (numpy); not isal: libisal-not-there.so.2:")
    assert "no-such-wheel is not installed" in done.stdout


def test_staggered_buffers_share_no_cache_set_at_their_start() -> None:
    addresses = [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in staggered_buffers(8, 1 << 16)]
    assert all(address % 64 == 0 for address in addresses)
    assert len({address % 4096 for address in addresses}) == 8
    distances = {later - earlier for earlier, later in itertools.pairwise(addresses)}
    assert len(distances) == 1

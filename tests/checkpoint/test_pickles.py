"""Pickles are read without executing anything: the same values as Python's own reader gives, or a clear refusal."""

import os
import pickle
import random
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from evermesh.checkpoint.foreign.pickle_machine import Class, Constant, Maker, PickleRefused, Record, Unknown
from evermesh.checkpoint.foreign.pickles import read_pickle

ORDERED: dict[str, Maker | Constant] = {"collections.OrderedDict": lambda *_: {}}
VALUES: list[Any] = [
    None,
    [True, False, 0, 1, -1, 255, 256, 65535, -(2**31), 2**31, 2**63, -(2**70), 10**80],
    [0.0, -1.5, 1e300, float("inf")],
    ["", "text", "ü" * 300, "\ud800", "line\nbreak", "quote'", "x" * 70_000],
    [b"", b"bytes\x00\xff", b"y" * 300, bytes(70_000)],
    {"a": {"b": (1, (2, [3])), 4: ()}, (1, "x"): [], 1.5: {}},
    [set(), {1, 2}, frozenset({"a"}), bytearray(b"abc")],
    [list(range(3000)), {i: str(i) for i in range(2000)}],
    (1, 2, 3, 4),
    OrderedDict(a=1, b=OrderedDict()),
]
BUILT: dict[str, Maker | Constant] = {
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.frozenset": frozenset,
    "__builtin__.frozenset": frozenset,
    "builtins.bytearray": lambda *a: bytearray(*a) if a and isinstance(a[0], bytes) else bytearray(a[0].encode(a[1])),
    "__builtin__.bytearray": lambda *a: bytearray(a[0].encode(a[1])) if len(a) == 2 else bytearray(*a),
    "_codecs.encode": lambda text, code: text.encode(code),
    "builtins.bytes": lambda: b"",
    "__builtin__.bytes": lambda: b"",
}
"""How old protocols spell what later ones have opcodes for."""


class Evil:
    """Runs a command when an ordinary reader meets it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


class Plain:
    """Only data."""

    def __init__(self) -> None:
        self.size, self.child = 3, [1]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_are_those_that_python_reads(value: Any, protocol: int) -> None:
    payload = pickle.dumps(value, protocol)
    found = read_pickle(payload, ORDERED | BUILT)
    assert found == pickle.loads(payload) == value  # noqa: S301


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_is_shared_stays_shared_and_may_contain_itself(protocol: int) -> None:
    shared: list[Any] = []
    shared.append(shared)
    first, second = read_pickle(pickle.dumps((shared, shared), protocol), {})
    assert first is second is first[0]


@pytest.mark.parametrize("protocol", range(6))
def test_a_global_is_refused_by_name_and_never_called(protocol: int, tmp_path: Path) -> None:
    payload = pickle.dumps([Evil(tmp_path / "was here")], protocol)
    with pytest.raises(PickleRefused, match=r"holds the global '(posix|nt)\.system'"):
        read_pickle(payload, ORDERED)
    (left,) = read_pickle(payload, ORDERED, refuse_unknown=False)
    assert isinstance(left, Unknown)
    assert left.name.endswith(".system")
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_of_known_classes_become_records(protocol: int) -> None:
    name = f"{Plain.__module__}.{Plain.__qualname__}"
    found = read_pickle(pickle.dumps(Plain(), protocol), {name: Class("Plain")})
    assert isinstance(found, Record)
    assert (found.name, found.get("size"), found.get("child"), found.get("none")) == ("Plain", 3, [1], None)
    assert read_pickle(pickle.dumps(Plain, protocol), {name: Constant("the class")}) == "the class"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "ends at byte 0"),
        (b"\x80\x02", "ends at byte 2"),
        (b"not a pickle", "damaged|opcode|global|line"),
        (b"B\xff\xff\xff\xff.", "in the middle of a value"),
        (b"\x8e" + b"\xff" * 8 + b".", "in the middle of a value"),
        (b"r\xff\xff\xff\xff.", "damaged"),
        (b"]r\xff\xff\xff\xff.", None),  # another reader would make a memo of four thousand million places
        (b"j\x00\x00\x00\x00.", "refers to value 0"),
        (b"(.", "a mark stands where a value is expected"),
        (b"t.", "a mark is missing|damaged"),
        (b"N)R.", "calls a value of type NoneType"),
        (b"}(]K\x01u.", "a key is a list"),
        (b"\x8b\x00\x10\x00\x00" + b"\x01" * 4096 + b".", "an integer of 4,096 bytes"),
        (b"L" + b"9" * 5000 + b"L\n.", "an integer of 5,001 digits"),
        (b"Pid\n.", "stored elsewhere"),
        (b"NK\x01b.", "attributes are set on a value of type NoneType"),
        (b"\xf0.", "opcode that is not known, 0xf0"),
    ],
)
def test_what_is_no_pickle_is_refused_with_the_reason(payload: bytes, message: str | None) -> None:
    if message is None:
        assert read_pickle(payload, {}) == []
        return
    with pytest.raises(PickleRefused, match=message):
        read_pickle(payload, {})


def test_every_truncation_and_thousands_of_mutations_are_refused_or_read_in_bounded_time() -> None:
    choice = random.Random(3)
    payloads = [pickle.dumps(VALUES[5:7] + VALUES[8:], protocol) for protocol in range(6)]
    began = time.monotonic()
    for payload in payloads:
        for end in range(len(payload)):
            with pytest.raises(PickleRefused):
                read_pickle(payload[:end], ORDERED | BUILT)
        for _ in range(1000):
            mutated = bytearray(payload)
            for _ in range(choice.randrange(1, 4)):
                mutated[choice.randrange(len(mutated))] = choice.randrange(256)
            try:
                read_pickle(bytes(mutated), ORDERED | BUILT)
            except PickleRefused:
                continue
    assert time.monotonic() - began < 60


def test_references_that_multiply_cost_nothing() -> None:
    deep = b"\x80\x02]" + b"q\x00h\x00\x86" * 5000 + b"."  # a tree of 2**5000 leaves, in 5,000 pairs
    assert isinstance(read_pickle(deep, {}), tuple)
    with pytest.raises(PickleRefused, match="a key is a tuple"):
        read_pickle(b"\x80\x02}]" + b"q\x00h\x00\x86" * 5000 + b"Ns.", {})

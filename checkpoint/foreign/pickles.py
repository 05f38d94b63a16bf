"""A reader of pickles that executes nothing: it is given a table of the globals it may meet and what each stands for.

Pickle is a program for a stack machine whose opcodes can import and call anything. Here the machine only builds lists,
dicts, tuples and sets; a global is looked up in a table of functions of ours, and one that is not in the table is
refused by name, or, where a caller can do without it, becomes an ``Unknown`` that does nothing. Memory and time are
linear in the size of the pickle: nothing is repeated, hashed deeply, or allocated because a number in it says so. The
opcodes are those of the module ``pickletools``, protocols 0 to 5.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from evermesh.checkpoint.foreign.pickle_machine import (
    MARK,
    MOST_INTEGER_BYTES,
    MOST_PICKLE_BYTES,
    Constant,
    Machine,
    Maker,
    PickleRefused,
    key_of,
)


def read_pickle(
    payload: bytes,
    makers: Mapping[str, Maker | Constant],
    persistent: Maker | None = None,
    *,
    refuse_unknown: bool = True,
) -> Any:
    """The object that ``payload`` describes.

    ``makers`` are by module and name, joined by a point. ``persistent`` takes the ids of objects that are stored
    elsewhere.

    Raises:
        PickleRefused: it is truncated or damaged, or holds a global that is not in the table.
    """
    if len(payload) > MOST_PICKLE_BYTES:
        raise PickleRefused(f"it is a pickle of {len(payload):,} bytes, more than {MOST_PICKLE_BYTES:,}")
    machine = Machine(payload, makers, persistent, refuse_unknown)
    try:
        return machine.run(_ACTIONS)
    except PickleRefused:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        # the machine trusts nothing it reads, but leaves it to Python to find out
        fact = f"it is damaged near byte {machine.position:,} ({type(error).__name__})"
        raise PickleRefused(fact) from error


def _number(text: bytes) -> int | bool:
    if text in (b"00", b"01"):  # how protocol 0 writes False and True
        return text == b"01"
    if len(text) > MOST_INTEGER_BYTES:
        raise PickleRefused(f"it has an integer of {len(text):,} digits")
    return int(text.rstrip(b"L"))


def _quoted(text: bytes) -> str:
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in b"'\"":
        raise PickleRefused("a text has no quotes")
    return text[1:-1].decode("unicode_escape")


def _new(machine: Machine, *, with_names: bool) -> None:
    names = machine.pop() if with_names else {}
    arguments = machine.pop()
    if names:
        raise PickleRefused("an object is made with named arguments")
    machine.push(machine.call(machine.pop(), arguments))


def _reduce(machine: Machine) -> None:
    arguments = machine.pop()
    machine.push(machine.call(machine.pop(), arguments))


def _object(machine: Machine) -> None:
    function, *arguments = machine.pop_to_mark()
    machine.push(machine.call(function, tuple(arguments)))


def _instance(machine: Machine) -> None:
    module, name = machine.line().decode(), machine.line().decode()
    machine.push(machine.call(machine.find(module, name), tuple(machine.pop_to_mark())))


def _global(machine: Machine) -> None:
    module, name = machine.line().decode(), machine.line().decode()
    machine.push(machine.find(module, name))


def _stack_global(machine: Machine) -> None:
    name = machine.pop()
    machine.push(machine.find(machine.pop(), name))


def _persistent(machine: Machine, identity: Any) -> None:
    if machine.persistent is None:
        raise PickleRefused("it refers to objects that are stored elsewhere")
    machine.push(machine.persistent(identity))


def _dict(machine: Machine) -> None:
    target: dict[Any, Any] = {}
    machine.set_items(target, machine.pop_to_mark())
    machine.push(target)


def _append(machine: Machine) -> None:
    value = machine.pop()
    machine.extend(machine.stack[-1], [value])


def _set_item(machine: Machine) -> None:
    value = machine.pop()
    key = machine.pop()
    machine.set_items(machine.stack[-1], [key, value])


def _extend(machine: Machine) -> None:
    values = machine.pop_to_mark()
    machine.extend(machine.stack[-1], values)


def _set_items(machine: Machine) -> None:
    values = machine.pop_to_mark()
    machine.set_items(machine.stack[-1], values)


def _tuple(count: int) -> "Callable[[Machine], None]":
    def make(machine: Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(values)))

    return make


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _signed(raw: bytes) -> int:
    if len(raw) > MOST_INTEGER_BYTES:
        raise PickleRefused(f"it has an integer of {len(raw):,} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _unsigned(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


_ACTIONS: dict[int, Callable[[Machine], Any]] = {
    ord("("): lambda m: m.push(MARK),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): lambda m: m.pop_to_mark(),
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("F"): lambda m: m.push(float(m.line())),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("I"): lambda m: m.push(_number(m.line())),
    ord("J"): lambda m: m.push(_signed(m.take(4))),
    ord("K"): lambda m: m.push(_unsigned(m.take(1))),
    ord("L"): lambda m: m.push(_number(m.line())),
    ord("M"): lambda m: m.push(_unsigned(m.take(2))),
    ord("N"): lambda m: m.push(None),
    ord("P"): lambda m: _persistent(m, m.line().decode("ascii")),
    ord("Q"): lambda m: _persistent(m, m.pop()),
    ord("R"): _reduce,
    ord("S"): lambda m: m.push(_quoted(m.line())),
    ord("T"): lambda m: m.push(m.sized(4).decode("latin-1")),
    ord("U"): lambda m: m.push(m.sized(1).decode("latin-1")),
    ord("V"): lambda m: m.push(m.line().decode("raw_unicode_escape")),
    ord("X"): lambda m: m.push(_text(m.sized(4))),
    ord("a"): _append,
    ord("b"): lambda m: m.build(m.pop()),
    ord("c"): _global,
    ord("d"): _dict,
    ord("e"): _extend,
    ord("g"): lambda m: m.recall(int(m.line())),
    ord("h"): lambda m: m.recall(_unsigned(m.take(1))),
    ord("i"): _instance,
    ord("j"): lambda m: m.recall(_unsigned(m.take(4))),
    ord("l"): lambda m: m.push(m.pop_to_mark()),
    ord("o"): _object,
    ord("p"): lambda m: m.remember(int(m.line())),
    ord("q"): lambda m: m.remember(_unsigned(m.take(1))),
    ord("r"): lambda m: m.remember(_unsigned(m.take(4))),
    ord("s"): _set_item,
    ord("t"): lambda m: m.push(tuple(m.pop_to_mark())),
    ord("u"): _set_items,
    ord(")"): lambda m: m.push(()),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord("B"): lambda m: m.push(m.sized(4)),
    ord("C"): lambda m: m.push(m.sized(1)),
    0x80: lambda m: m.take(1),  # PROTO
    0x81: lambda m: _new(m, with_names=False),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x8A: lambda m: m.push(_signed(m.sized(1))),
    0x8B: lambda m: m.push(_signed(m.sized(4))),
    0x8C: lambda m: m.push(_text(m.sized(1))),
    0x8D: lambda m: m.push(_text(m.sized(8))),
    0x8E: lambda m: m.push(m.sized(8)),
    0x8F: lambda m: m.push(set()),
    0x90: _extend,
    0x91: lambda m: m.push(frozenset(map(key_of, m.pop_to_mark()))),
    0x92: lambda m: _new(m, with_names=True),
    0x93: _stack_global,
    0x94: lambda m: m.remember(len(m.memo)),
    0x95: lambda m: m.take(8),  # FRAME
    0x96: lambda m: m.push(m.sized(8)),
}

"""A reader of pickles that executes nothing: it is given a table of the globals it may meet and what each stands for.

Pickle is a program for a stack machine whose opcodes can import and call anything. Here the machine only builds lists,
dicts, tuples and sets; a global is looked up in a table of functions of ours, and one that is not in the table is
refused by name, or, where a caller can do without it, becomes an ``Unknown`` that does nothing. Memory and time are
linear in the size of the pickle: nothing is repeated, hashed deeply, or allocated because a number in it says so. The
opcodes are those of the module ``pickletools``, protocols 0 to 5.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_PICKLE_BYTES = 1 << 30
_MOST_INTEGER_BYTES = 1024
_MOST_KEY_PARTS = 16
"""Long integers and tuples are hashed anew whenever they are used as a key: both are bounded."""
_MARK = object()
_NOTHING = object()


class PickleRefused(ValueError):
    """The bytes are no pickle, or one that asks for what is not allowed; the message states the fact."""


@dataclass(eq=False, slots=True)
class Record:
    """An object of a known class: its name and what it was made of. Two of them are never equal."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    """Of a subclass of list, or pairs of one of dict."""

    def get(self, name: str, default: Any = None) -> Any:
        """One of its attributes."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class Unknown(Record):
    """A global that is not in the table, or what would have been made by calling it."""


Maker = Callable[..., Any]
"""What stands for a global: a function of ours that is called with what was pickled for it."""


@dataclass(frozen=True, slots=True)
class Class:
    """A maker of records; stands for a class whose objects are only data."""

    name: str

    def __call__(self, *arguments: Any) -> Record:
        return Record(self.name, arguments)


@dataclass(frozen=True, slots=True)
class Constant:
    """What stands for a global that is no function, such as a dtype."""

    value: Any


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
    machine = _Machine(payload, makers, persistent, refuse_unknown)
    try:
        return machine.run()
    except PickleRefused:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        # the machine trusts nothing it reads, but leaves it to Python to find out
        fact = f"it is damaged near byte {machine.position:,} ({type(error).__name__})"
        raise PickleRefused(fact) from error


class _Machine:
    """The stack machine. Every opcode is a method."""

    def __init__(
        self,
        payload: bytes,
        makers: Mapping[str, Maker | Constant],
        persistent: Maker | None,
        refuse_unknown: bool,
    ) -> None:
        self.payload, self.position = payload, 0
        self.makers, self.persistent, self.refuse_unknown = makers, persistent, refuse_unknown
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Execute opcodes until STOP."""
        while True:
            opcode = self.take(1)[0]
            if opcode == 0x2E:  # STOP
                return self.pop()
            action = _ACTIONS.get(opcode)
            if action is None:
                raise PickleRefused(f"it has an opcode that is not known, {opcode:#04x}, at byte {self.position - 1:,}")
            action(self)

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        end = self.position + num_bytes
        if num_bytes < 0 or end > len(self.payload):
            raise PickleRefused(f"it ends at byte {len(self.payload):,}, in the middle of a value")
        taken = self.payload[self.position : end]
        self.position = end
        return taken

    def line(self) -> bytes:
        """The bytes up to the next end of line."""
        end = self.payload.find(b"\n", self.position)
        if end < 0:
            raise PickleRefused(f"it ends at byte {len(self.payload):,}, in the middle of a line")
        taken = self.payload[self.position : end]
        self.position = end + 1
        return taken

    def sized(self, width: int) -> bytes:
        """Bytes that follow their number."""
        return self.take(int.from_bytes(self.take(width), "little"))

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleRefused("a mark stands where a value is expected")
        return value

    def pop_to_mark(self) -> list[Any]:
        """All values above the highest mark, which goes too."""
        stack, at = self.stack, len(self.stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleRefused("a mark is missing")
        values = stack[at + 1 :]
        del stack[at:]
        return values

    def find(self, module: Any, name: Any) -> Any:
        """What stands for a global."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleRefused("the name of a global is no text")
        full = f"{module}.{name}"
        known = self.makers.get(full)
        if isinstance(known, Constant):
            return known.value
        if known is not None:
            return known
        if self.refuse_unknown:
            raise PickleRefused(f"it holds the global {full[:200]!r}, which is not one that is needed here")
        return Unknown(full[:200])

    def call(self, function: Any, arguments: Any) -> Any:
        """What stands for the result of calling a global."""
        if not isinstance(arguments, tuple):
            raise PickleRefused("the arguments of a call are no tuple")
        if isinstance(function, Unknown):
            return Unknown(function.name, arguments)
        if isinstance(function, Record) or not callable(function):
            raise PickleRefused(f"it calls a value of type {type(function).__name__}")
        return function(*arguments)

    def set_items(self, target: Any, values: list[Any]) -> None:
        if len(values) % 2:
            raise PickleRefused("a key has no value")
        pairs = list(zip(values[::2], values[1::2], strict=True))
        if isinstance(target, dict):
            for key, value in pairs:
                target[_key(key)] = value
        elif isinstance(target, Record):
            target.items.extend(pairs)
        else:
            raise PickleRefused(f"items are set in a value of type {type(target).__name__}")

    def extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Record):
            target.items.extend(values)
        elif isinstance(target, set):
            target.update(map(_key, values))
        else:
            raise PickleRefused(f"values are added to one of type {type(target).__name__}")

    def build(self, state: Any) -> None:
        """Give the object on the stack its attributes."""
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict may have attributes, which nobody needs
            raise PickleRefused(f"attributes are set on a value of type {type(target).__name__}")

    def remember(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise PickleRefused("a mark stands where a value is expected")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        value = self.memo.get(index, _NOTHING)
        if value is _NOTHING:
            raise PickleRefused(f"it refers to value {index}, which it does not hold")
        self.push(value)


_KEYS = (bool, int, float, str, bytes, Record)


def _key(key: Any) -> Any:
    """A key of a dict, if it is one whose hash takes no time."""
    parts = key if type(key) is tuple else (key,)
    is_plain = (part is None or isinstance(part, _KEYS) for part in parts)
    if len(parts) <= _MOST_KEY_PARTS and all(is_plain):
        return key
    raise PickleRefused(f"a key is a {type(key).__name__} that is no plain value, or has too many parts")


def _number(text: bytes) -> int | bool:
    if text in (b"00", b"01"):  # how protocol 0 writes False and True
        return text == b"01"
    if len(text) > _MOST_INTEGER_BYTES:
        raise PickleRefused(f"it has an integer of {len(text):,} digits")
    return int(text.rstrip(b"L"))


def _quoted(text: bytes) -> str:
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in b"'\"":
        raise PickleRefused("a text has no quotes")
    return text[1:-1].decode("unicode_escape")


def _new(machine: _Machine, *, with_names: bool) -> None:
    names = machine.pop() if with_names else {}
    arguments = machine.pop()
    if names:
        raise PickleRefused("an object is made with named arguments")
    machine.push(machine.call(machine.pop(), arguments))


def _reduce(machine: _Machine) -> None:
    arguments = machine.pop()
    machine.push(machine.call(machine.pop(), arguments))


def _object(machine: _Machine) -> None:
    function, *arguments = machine.pop_to_mark()
    machine.push(machine.call(function, tuple(arguments)))


def _instance(machine: _Machine) -> None:
    module, name = machine.line().decode(), machine.line().decode()
    machine.push(machine.call(machine.find(module, name), tuple(machine.pop_to_mark())))


def _global(machine: _Machine) -> None:
    module, name = machine.line().decode(), machine.line().decode()
    machine.push(machine.find(module, name))


def _stack_global(machine: _Machine) -> None:
    name = machine.pop()
    machine.push(machine.find(machine.pop(), name))


def _persistent(machine: _Machine, identity: Any) -> None:
    if machine.persistent is None:
        raise PickleRefused("it refers to objects that are stored elsewhere")
    machine.push(machine.persistent(identity))


def _dict(machine: _Machine) -> None:
    target: dict[Any, Any] = {}
    machine.set_items(target, machine.pop_to_mark())
    machine.push(target)


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.extend(machine.stack[-1], [value])


def _set_item(machine: _Machine) -> None:
    value = machine.pop()
    key = machine.pop()
    machine.set_items(machine.stack[-1], [key, value])


def _extend(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    machine.extend(machine.stack[-1], values)


def _set_items(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    machine.set_items(machine.stack[-1], values)


def _tuple(count: int) -> "Callable[[_Machine], None]":
    def make(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(values)))

    return make


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _signed(raw: bytes) -> int:
    if len(raw) > _MOST_INTEGER_BYTES:
        raise PickleRefused(f"it has an integer of {len(raw):,} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _unsigned(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


_ACTIONS: dict[int, Callable[[_Machine], Any]] = {
    ord("("): lambda m: m.push(_MARK),
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
    0x91: lambda m: m.push(frozenset(map(_key, m.pop_to_mark()))),
    0x92: lambda m: _new(m, with_names=True),
    0x93: _stack_global,
    0x94: lambda m: m.remember(len(m.memo)),
    0x95: lambda m: m.take(8),  # FRAME
    0x96: lambda m: m.push(m.sized(8)),
}

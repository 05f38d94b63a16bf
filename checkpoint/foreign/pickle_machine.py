"""What a reader of pickles makes and what it works with; see ``evermesh.checkpoint.foreign.pickles``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_PICKLE_BYTES = 1 << 30
MOST_INTEGER_BYTES = 1024
MOST_KEY_PARTS = 16
"""Long integers and tuples are hashed anew whenever they are used as a key: both are bounded."""
MARK = object()
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


class Machine:
    """The stack machine: values, a memo, and what opcodes do with them."""

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

    def run(self, actions: "Mapping[int, Callable[[Machine], Any]]") -> Any:
        """Execute opcodes until STOP."""
        while True:
            opcode = self.take(1)[0]
            if opcode == 0x2E:  # STOP
                return self.pop()
            action = actions.get(opcode)
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
        if value is MARK:
            raise PickleRefused("a mark stands where a value is expected")
        return value

    def pop_to_mark(self) -> list[Any]:
        """All values above the highest mark, which goes too."""
        stack, at = self.stack, len(self.stack) - 1
        while stack[at] is not MARK:
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
                target[key_of(key)] = value
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
            target.update(map(key_of, values))
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
        if self.stack[-1] is MARK:
            raise PickleRefused("a mark stands where a value is expected")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        value = self.memo.get(index, _NOTHING)
        if value is _NOTHING:
            raise PickleRefused(f"it refers to value {index}, which it does not hold")
        self.push(value)


_KEYS = (bool, int, float, str, bytes, Record)


def key_of(key: Any) -> Any:
    """A key of a dict, if it is one whose hash takes no time."""
    parts = key if type(key) is tuple else (key,)
    is_plain = (part is None or isinstance(part, _KEYS) for part in parts)
    if len(parts) <= MOST_KEY_PARTS and all(is_plain):
        return key
    raise PickleRefused(f"a key is a {type(key).__name__} that is no plain value, or has too many parts")

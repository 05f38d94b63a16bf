"""The tap in Python: methods of torch's ProcessGroup, and Work.wait, in which ends of awaited operations show.

What C++ issues by itself (the reducer of DDP, functional collectives, DTensor) it does not see; the heartbeat counts that.
The backend is entered as ever, without the interpreter's lock. Ends are stamped only by who waits: a callback would come
when the interpreter's lock is free, milliseconds late.
"""

import itertools
import struct
import sys
import threading
import weakref
from collections.abc import Callable
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from evermesh.fault.recorder import ring_format as form
from evermesh.fault.recorder.record import DTYPES, NO_PEER, OPERATIONS, Flags
from evermesh.fault.recorder.ring import Ring

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FIELDS = struct.Struct("<Q16xQIIIIiBBBx")
"""A record without its sequence number; the times and flags that are known later become 0."""
_METHODS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "allgather": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
    "_allgather_base": ("all_gather", 1),
    "allgather_coalesced": ("all_gather", 1),
    "all_gather_single_coalesced": ("all_gather", 1),
    "allgather_into_tensor_coalesced": ("all_gather", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "all_to_all_single": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "alltoall": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "gather": ("gather", 1),
    "scatter": ("scatter", 0),
    "barrier": ("barrier", None),
    "monitored_barrier": ("barrier", None),
    "send": ("send", 0),
    "recv": ("receive", 0),
    "recv_anysource": ("receive_any", 0),
}
"""Methods of ProcessGroup: what they are, and which argument behind the group is the local buffer."""
_ROOTED = frozenset({"broadcast", "reduce", "gather", "scatter"})
_MESSAGES = frozenset({"send", "receive", "receive_any"})


_OF_TORCH: Any = object()
"""The timeout of whoever names none."""


class _Announced(NamedTuple):
    left: int
    site: int
    step: int
    phase: int


class _Group:
    """A process group as its next record needs it."""

    __slots__ = ("alive", "collectives", "index", "is_host", "messages")

    def __init__(self, index: int, alive: Any, is_host: bool) -> None:
        self.index, self.alive, self.is_host = index, alive, is_host
        self.collectives = itertools.count()
        self.messages: dict[tuple[str, int], itertools.count[int]] = {}

    def number_of_message(self, operation: str, peer: int) -> int:
        return next(self.messages.setdefault((operation, peer), itertools.count()))


class PythonTap:
    """See :class:`evermesh.fault.recorder.tap.Tap`. One per process."""

    tier = "python"

    def __init__(self, ring: Ring, site_of_caller: Callable[[], int]) -> None:
        self._ring = ring
        self._site_of_caller = site_of_caller
        self._before: dict[tuple[type, str], Any] = {}
        words = range(form.RECORDS_AT // form.WORD_BYTES, form.RING_BYTES // form.WORD_BYTES, form.WORDS_PER_RECORD)
        self._places = zip(itertools.count(1), itertools.cycle(words), strict=False)
        """Sequence number and first word of the next record; taken by one step of the interpreter."""
        self._indices = itertools.count(1)
        self._groups: dict[int, _Group] = {}
        self._waited: dict[int, tuple[int, int]] = {}
        """Sequence and first word of the record of a Work, by its id; whoever takes over the id takes over the entry."""
        self._announced: dict[int, _Announced] = {}
        """By thread."""
        self._names_lock = threading.Lock()
        self._muted: list[bool] = []
        """Nothing is written any more as soon as something is in it."""

    def install(self) -> None:
        """Patch the methods."""
        import torch
        from torch._C._distributed_c10d import ProcessGroup, Work

        dtypes = {getattr(torch, name): index for index, name in enumerate(DTYPES) if hasattr(torch, name)}
        for name, (operation, buffer) in _METHODS.items():
            original = ProcessGroup.__dict__.get(name)  # by getattr the descriptor would be lost
            if original is not None:
                self._before[ProcessGroup, name] = original
                setattr(ProcessGroup, name, self._recorded(original.__func__, operation, buffer, dtypes))
        self._before[Work, "wait"] = original = Work.__dict__["wait"]
        Work.wait = self._waiting(original.__func__)  # type: ignore[method-assign]

    def restore(self) -> None:
        """Put back what was there before."""
        for (owner, name), original in self._before.items():
            setattr(owner, name, original)
        self._before.clear()

    def mute(self) -> None:
        """Write nothing any more."""
        self._muted.append(True)

    def introduce(self, group: "ProcessGroup") -> int:
        """The index of ``group``."""
        return (self._groups.get(id(group)) or self._first_seen(group)).index

    def append_name(self, line: bytes) -> None:
        """Append a line to the names."""
        with self._names_lock:
            self._ring.append_name(line)

    def announce(self, site: int, moment: int) -> None:
        """As :class:`Tap` says."""
        thread = threading.get_ident()
        before = self._announced.get(thread)
        left = before.left + 1 if before else 1
        self._announced[thread] = _Announced(left, site, moment & 0xFFFFFFFF, moment >> form.STEP_BITS)

    def _take_announced(self) -> tuple[int, int, int] | None:
        """Site, step and phase of an operation of this thread that was announced."""
        found = self._announced.pop(threading.get_ident(), None)
        if found is None:
            return None
        if found.left > 1:
            self._announced[threading.get_ident()] = found._replace(left=found.left - 1)
        return found.site, found.step, found.phase

    def _first_seen(self, group: Any) -> _Group:
        key = id(group)
        forget = weakref.ref(group, lambda _: self._groups.pop(key, None))
        is_host = [device.type for device in group._device_types] == ["cpu"]
        return self._groups.setdefault(key, _Group(next(self._indices), forget, is_host))

    def _recorded(
        self, call: Callable[..., Any], operation: str, at: int | None, dtypes: dict[Any, int]
    ) -> Callable[..., Any]:
        """``call``, a method, between two stamps. What it needs are variables of this closure: attributes cost time, and so
        do arguments that are taken apart and put together again."""
        memory, words, pack, here = self._ring.memory, self._ring.words, _FIELDS.pack_into, self._ring.here
        code, is_message, is_rooted = OPERATIONS.index(operation), operation in _MESSAGES, operation in _ROOTED
        groups, waited, places, announced = self._groups, self._waited, self._places, self._announced
        site_of_caller, enqueued_word, muted = self._site_of_caller, form.ENQUEUED_WORD, self._muted
        blocks = int(Flags.BLOCKING | Flags.END_SEEN) if operation == "barrier" else 0  # the monitored one
        failed = int(Flags.FAILED | Flags.END_SEEN)
        buffer_at = at + 1 if at is not None else sys.maxsize

        def recorded(*arguments: Any, **named: Any) -> Any:
            entered = monotonic_ns()
            if muted:
                return call(*arguments, **named)
            group = arguments[0]
            known = groups.get(id(group)) or self._first_seen(group)
            peer, num_bytes, dtype, buffer = NO_PEER, 0, 0, None
            if is_message:
                peer = arguments[2] if len(arguments) > 3 else NO_PEER
                number = known.number_of_message(operation, peer)
            else:
                number = next(known.collectives)
                if is_rooted:
                    peer = _root_of(arguments)
            if len(arguments) > buffer_at:
                buffer = arguments[buffer_at]
                if type(buffer) is list and len(buffer) == 1:
                    buffer = buffer[0]
                try:
                    num_bytes, dtype = buffer.nbytes, dtypes.get(buffer.dtype, _OTHER)
                except AttributeError:  # several
                    num_bytes, dtype, buffer = _size_of(buffer, dtypes)
            step, phase = here
            if announced and (found := self._take_announced()) is not None:
                site, step, phase = found
            else:
                site = site_of_caller()
            sequence, word = next(places)
            words[word] = 0
            pack(memory, word * 8 + 8, entered, num_bytes, known.index, number, step, site, peer, code, dtype, phase)
            words[word] = sequence
            try:
                work = call(*arguments, **named) if named else call(*arguments)
            except BaseException:
                self._end(sequence, word, failed)
                raise
            words[word + enqueued_word] = monotonic_ns()
            if work is None:
                if blocks:
                    self._end(sequence, word, blocks)
            elif (
                known.is_host or buffer is None or buffer.is_cpu
            ):  # on a GPU waiting is no more than an order to the stream
                waited[id(work)] = sequence, word
            return work

        return recorded

    def _waiting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        words, flags, take = self._ring.words, self._ring.octets, self._waited.pop
        blocking, failed = int(Flags.BLOCKING | Flags.END_SEEN), int(Flags.BLOCKING | Flags.END_SEEN | Flags.FAILED)
        ended_word, flags_byte, muted = form.ENDED_WORD, form.FLAGS_BYTE, self._muted

        def wait(work: Any, timeout: Any = _OF_TORCH) -> Any:
            place = take(id(work), None)
            if place is None or muted:
                return call(work) if timeout is _OF_TORCH else call(work, timeout)
            sequence, word = place
            if words[word] == sequence:  # else the slot was written anew meanwhile
                flags[word * 8 + flags_byte] = blocking
            try:
                result = call(work) if timeout is _OF_TORCH else call(work, timeout)
            except BaseException:
                self._end(sequence, word, failed)
                raise
            if words[word] == sequence:
                words[word + ended_word] = monotonic_ns()
            return result

        return wait

    def _end(self, sequence: int, word: int, flags: int) -> None:
        """Stamp the end, if the slot has not been written anew meanwhile."""
        words = self._ring.words
        if words[word] == sequence:
            self._ring.octets[word * 8 + form.FLAGS_BYTE] = flags
            words[word + form.ENDED_WORD] = monotonic_ns()


def _root_of(arguments: tuple[Any, ...]) -> int:
    root = getattr(arguments[-1], "rootRank", NO_PEER) if arguments else NO_PEER
    return int(root)


def _size_of(parts: Any, dtypes: dict[Any, int]) -> tuple[int, int, Any]:
    """Bytes and dtype of lists of tensors, and one of these."""
    if not isinstance(parts, list | tuple):
        return parts.nbytes, dtypes.get(parts.dtype, _OTHER), parts
    sizes = [_size_of(part, dtypes) for part in parts]
    return (sum(size[0] for size in sizes), *sizes[0][1:]) if sizes else (0, 0, None)


_OTHER = DTYPES.index("other")

"""The native tap as Python drives it, through ctypes: no Python API is compiled in, so one build serves every Python."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evermesh.fault.recorder.errors import TapUnusable
from evermesh.fault.recorder.ring import Ring

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MESSAGES = ("send", "recv", "recv_anysource")


class NativeTap:
    """See :class:`evermesh.fault.recorder.tap.Tap`. One per process.

    Ends come from the futures of the backend, without Python. Messages have none on gloo: theirs is stamped by who waits,
    in a patch of ``Work.wait`` that looks a Work up and else only passes on.

    Raises:
        TapUnusable: the library cannot be loaded: torch is not the one that it was built for.
    """

    tier = "native"

    def __init__(self, ring: Ring, library: Path, *, stamps_ends: bool = True) -> None:
        self._ring, self._stamps_ends = ring, stamps_ends
        try:
            # calls through PyDLL keep the interpreter's lock: giving it away costs more than what they do
            self._library = ctypes.PyDLL(str(library))
            self._declare()
        except (OSError, AttributeError) as error:
            raise TapUnusable(f"{library} cannot be loaded: {error}. Build it anew: evermesh doctor") from error
        self.announce: Callable[[int, int], None] = self._library.evermesh_tap_announce
        self._before: dict[tuple[type, str], Any] = {}

    def install(self) -> None:
        """Put a kernel in front of every collective.

        Raises:
            TapUnusable: torch has none to put one in front of, or refuses; nothing has changed.
        """
        seen = self._library.evermesh_tap_install(str(self._ring.path).encode())
        if seen <= 0:
            why = self._library.evermesh_tap_error().decode(errors="replace") or "torch has no operators of c10d"
            self._library.evermesh_tap_restore()
            raise TapUnusable(f"the native tap cannot be installed: {why.splitlines()[0]}")
        self.stamp_ends(wanted=self._stamps_ends)
        if self._stamps_ends:
            self._patch_messages()

    def stamp_ends(self, *, wanted: bool) -> None:
        """Whether ends are stamped from now on."""
        self._library.evermesh_tap_stamp_ends(wanted)

    def restore(self) -> None:
        """Put back what was there before."""
        self._library.evermesh_tap_restore()
        for (owner, name), original in self._before.items():
            setattr(owner, name, original)
        self._before.clear()

    def mute(self) -> None:
        """Write nothing any more."""
        self._library.evermesh_tap_record(0)

    def introduce(self, group: "ProcessGroup") -> int:
        """The index of ``group``."""
        return self._library.evermesh_tap_group(group._id())  # type: ignore[attr-defined]  # its address

    def append_name(self, line: bytes) -> None:
        """Append a line to the names."""
        self._library.evermesh_tap_name(line, len(line))

    def _declare(self) -> None:
        library, number, index = self._library, ctypes.c_uint64, ctypes.c_uint32
        for name, arguments, result in (
            ("install", [ctypes.c_char_p], ctypes.c_int),
            ("error", [], ctypes.c_char_p),
            ("restore", [], None),
            ("record", [ctypes.c_int], None),
            ("stamp_ends", [ctypes.c_int], None),
            ("group", [number], index),
            ("name", [ctypes.c_char_p, number], ctypes.c_int),
            ("announce", [index, number], None),
            ("last", [], number),
            ("waited", [number, ctypes.c_int, ctypes.c_int], None),
        ):
            function = getattr(library, f"evermesh_tap_{name}")
            function.argtypes, function.restype = arguments, result

    def _patch_messages(self) -> None:
        from torch._C._distributed_c10d import ProcessGroup, Work

        waited: dict[int, int] = {}
        for name in _MESSAGES:
            self._replace(ProcessGroup, name, _remembering(ProcessGroup.__dict__[name], waited, self._library))
        self._replace(Work, "wait", _waiting(Work.__dict__["wait"], waited, self._library))

    def _replace(self, owner: type, name: str, new: Any) -> None:
        self._before[owner, name] = owner.__dict__[name]  # by getattr the descriptor would be lost
        setattr(owner, name, new)


def _remembering(original: Any, waited: dict[int, int], library: ctypes.CDLL) -> Callable[..., Any]:
    call, last = original.__func__, library.evermesh_tap_last

    def send_or_receive(group: Any, tensors: Any, *arguments: Any, **named: Any) -> Any:
        work = call(group, tensors, *arguments, **named)
        if work is not None and all(tensor.is_cpu for tensor in tensors):  # on a GPU waiting only orders the stream
            waited[id(work)] = last()
        return work

    return send_or_receive


def _waiting(original: Any, waited: dict[int, int], library: ctypes.CDLL) -> Callable[..., Any]:
    call, tell, take = original.__func__, library.evermesh_tap_waited, waited.pop

    def wait(work: Any, *arguments: Any, **named: Any) -> Any:
        sequence = take(id(work), None)
        if sequence is None:
            return call(work, *arguments, **named)
        tell(sequence, 0, 0)
        try:
            result = call(work, *arguments, **named)
        except BaseException:
            tell(sequence, 1, 1)
            raise
        tell(sequence, 1, 0)
        return result

    return wait

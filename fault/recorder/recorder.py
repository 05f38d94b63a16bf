"""The recorder of a process: its ring, the best tap that works here, its heartbeat, and the names of groups and sites."""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from evermesh.fault.recorder.errors import TapUnusable
from evermesh.fault.recorder.groups import GroupWatch, description_of
from evermesh.fault.recorder.heartbeat import Heartbeat
from evermesh.fault.recorder.names import group_line
from evermesh.fault.recorder.ring import Ring, RingSpec, packed
from evermesh.fault.recorder.sites import Sites
from evermesh.fault.recorder.tap import Tap
from evermesh.parallelism import collectives
from evermesh.parallelism.collectives import Communicator, Moment, Phase, Point

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Wanted = Literal["auto", "native", "python", "heartbeat"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Who records, and why nobody better."""

    tier: str
    because: str = ""
    """Empty: it is the best there is."""

    def __str__(self) -> str:
        return self.tier + (f" ({self.because})" if self.because else "")


class Recorder:
    """Records every collective and message of this process from now on, until ``stop``. One per process.

    No rank waits for another here, and nothing that fails later fails the collective.

    Args:
        spec: whose ring it is; its folder exists.
        wanted: the tap; ``auto``: the native one if it was built for this torch, else the one in Python. ``heartbeat``: none.
        stamps_ends: whether the native tap stamps ends.

    Raises:
        RoomMissing: shared memory has no room for the ring; nothing has changed.
        TapUnusable: the tap that is ``wanted`` cannot be had; nothing is left.
    """

    def __init__(self, spec: RingSpec, *, wanted: Wanted = "auto", stamps_ends: bool = True) -> None:
        self.ring = Ring.make(spec)
        self._indices: dict[str, int] = {}
        """Of groups, by torch's name."""
        self._ranks: dict[int, tuple[int, ...]] = {}
        self._axes: dict[int, list[str]] = {}
        self._named: dict[int, weakref.ref[Communicator]] = {}
        self._sites = Sites(self._append_name)
        try:
            self._tap, self.chosen = _install(self.ring, wanted, stamps_ends, self._sites.of_caller)
        except TapUnusable:
            spec.path.unlink()
            raise
        self.ring.note_tier(self.chosen.tier)
        self._watch = GroupWatch(self._note_group)
        self._heartbeat = Heartbeat(self.ring, self._indices.get)
        if self._tap is not None:
            collectives.announce_to(self._announce)
        _living.add(self)

    def follow(self, moment: Moment) -> None:
        """Have records and header say where ``moment`` stands, from now on."""
        before = moment.watch

        def watch(point: Point) -> None:
            self.ring.note_moment(moment.step, moment.phase)
            if before is not None:
                before(point)

        moment.watch = watch
        self.ring.note_moment(moment.step, moment.phase)

    def note_moment(self, step: int, phase: Phase) -> None:
        """Say where this process is, where no ``Moment`` does."""
        self.ring.note_moment(step, phase)

    def stop(self) -> None:
        """Leave torch as it was; the ring stays as it is. No collective is under way."""
        _living.discard(self)
        collectives.announce_to(None)
        self._heartbeat.stop()
        self._watch.restore()
        if self._tap is not None:
            self._tap.restore()

    def _note_group(self, group: "ProcessGroup", ranks: tuple[int, ...]) -> None:
        index = self._tap.introduce(group) if self._tap is not None else len(self._indices) + 1
        self._indices[group.group_name] = index
        self._ranks[index], self._axes[index] = ranks, []
        self._append_name(group_line(index, group.group_name, ranks, description_of(group)))

    def _announce(self, communicator: Communicator, call_site: str) -> None:
        assert self._tap is not None
        if id(communicator) not in self._named:
            self._name(communicator)
        self._tap.announce(self._sites.index_of(call_site), packed(communicator.moment))

    def _name(self, communicator: Communicator) -> None:
        """Call a group by the axes of the communicators that use it."""
        key, group = id(communicator), communicator.group
        self._named[key] = weakref.ref(communicator, lambda _: self._named.pop(key, None))
        index = self._indices.get(group.group_name) if group is not None else None
        if group is not None and index is not None and communicator.axis not in self._axes[index]:
            self._axes[index].append(communicator.axis)
            self._append_name(group_line(index, group.group_name, self._ranks[index], ", ".join(self._axes[index])))

    def _append_name(self, line: bytes) -> None:
        if self._tap is not None:
            self._tap.append_name(line)
        else:
            self.ring.append_name(line)

    def _mute(self) -> None:
        """In a child that was forked: the ring is its parent's."""
        collectives.announce_to(None)
        if self._tap is not None:
            self._tap.mute()


def _install(ring: Ring, wanted: Wanted, stamps_ends: bool, site: Callable[[], int]) -> tuple[Tap | None, Chosen]:
    """The best tap that works. A torch with hooks of its own for collectives would come first here."""
    if wanted == "heartbeat":
        return None, Chosen("heartbeat")
    because = ""
    if wanted != "python":
        try:
            return _native(ring, stamps_ends), Chosen("native")
        except TapUnusable as error:
            if wanted == "native":
                raise
            because = str(error)
    from evermesh.fault.recorder.python_tap import PythonTap

    tap = PythonTap(ring, site)
    tap.install()
    return tap, Chosen("python", because)


def _native(ring: Ring, stamps_ends: bool) -> Tap:
    import torch

    from evermesh.fault.recorder.native.building import find_tap
    from evermesh.fault.recorder.native.tap import NativeTap

    tap = NativeTap(ring, find_tap(torch.__version__), stamps_ends=stamps_ends)
    tap.install()
    return tap


_living: "weakref.WeakSet[Recorder]" = weakref.WeakSet()


def _mute_all() -> None:
    for recorder in list(_living):
        recorder._mute()


os.register_at_fork(after_in_child=_mute_all)

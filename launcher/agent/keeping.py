"""The keeper of a node, as its agent sees to it: started for a launch, started again if it dies, ended with the job."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from evermesh.fault.snapshot.handshake import Address
from evermesh.fault.snapshot.keeper.area import area_of, identity_in
from evermesh.fault.snapshot.keeper.keeper import inventory
from evermesh.fault.snapshot.keeper.layouts import groups_in
from evermesh.fault.snapshot.keeper.parity import protected_in
from evermesh.fault.snapshot.keeper.process import KeeperProcess
from evermesh.fault.snapshot.keeper.serving import address_in
from evermesh.fault.snapshot.keeper.slots import NUM_SLOTS
from evermesh.fault.snapshot.remote import Keepers
from evermesh.launcher.contact import keeper_secret
from evermesh.launcher.messages import InMemory, KeeperAt, ProtectedPart, SnapshotPart

KEEPER_LOST = "keeper lost"
"""The event that another keeper is started."""
_AGAIN_S = 2.0
"""How often it is tried to start one that could not be started."""


class NodeKeeper:
    """The keeper of ``node`` in ``run``, if workers leave snapshots there. It outlives this agent, unless the job is over.

    Others reach it at ``address``, with a secret that follows from the ``token`` of the run. Of every rank it keeps as many
    snapshots as there are ``slots``.
    """

    def __init__(self, run: Path, node: str, address: str, token: str, slots: int = NUM_SLOTS) -> None:
        self._address, self._token, self._slots = address, token, slots
        self.area, self._log = area_of(run, node), run / "logs" / f"keeper-{node}.log"
        self._process: KeeperProcess | None = None
        self._launch: str | None = None
        """For which a keeper is wanted."""
        self._tried_s, self._why_missing = 0.0, ""
        self._noticed: list[tuple[str, str]] = []
        self._told_rotten = 0
        """How much of what the keeper found damaged was told."""

    def keep_for(self, launch: str | None) -> Path | None:
        """Where the workers of a launch leave snapshots; None: they do not want to. Where no keeper can be started it is
        tried again and again, and training goes on without."""
        if launch is None:
            return None
        if not self.is_there or launch != self._launch:
            self.leave(job_is_over=False)
            self._launch = launch
            self._start(launch)
        return self.area

    @property
    def is_there(self) -> bool:
        """Whether a keeper was started, or found."""
        return self._process is not None

    def look(self) -> list[tuple[str, str]]:
        """Called now and then: a keeper that has died, or is stopped, is started again, and finds what the one before it has
        left. Returns what the event log is to tell, kind and text."""
        self._look()
        noticed, self._noticed = self._noticed, []
        return noticed

    @property
    def is_alive(self) -> bool:
        """Whether some keeper lives in the area, of this agent or of one before it."""
        found = identity_in(self.area)
        return found is not None and found.is_alive

    @property
    def num_bytes(self) -> int:
        """Memory of the snapshots, and of the parity of others'."""
        found = 0
        for path in (*self.area.glob("rank-*/slot-*/*"), *self.area.glob("parity-*/*")):
            with suppress(OSError):  # it is being given back
                found += path.stat().st_size
        return found

    @property
    def address(self) -> KeeperAt | None:
        """Where other nodes read; None: nowhere, or it does not listen yet."""
        found = address_in(self.area) if self._process is not None else None
        return KeeperAt(host=found.host, port=found.port) if found is not None else None

    def others(self, launch: str | None, keepers: Sequence[KeeperAt]) -> Keepers | None:
        """What workers need to read the memory of all nodes; None: they make no snapshots."""
        if launch is None:
            return None
        addresses = tuple(Address(keeper.host, keeper.port) for keeper in keepers)
        return Keepers(addresses, launch, keeper_secret(self._token, launch))

    def in_memory(self) -> InMemory | None:
        """What ranks have left in memory, also before this agent; None if there is nothing."""
        found = identity_in(self.area)
        if found is None:
            return None
        self._look()  # the address is that of a keeper that lives
        worlds = {(group.generation, group.shard_map): group.world_size for group in groups_in(self.area)}
        parts = tuple(
            SnapshotPart(
                rank=part["rank"],
                generation=part["generation"],
                step=part["step"],
                shard_map=part["shard_map"],
                world_size=worlds.get((part["generation"], part["shard_map"])),
            )
            for part in inventory(self.area)
        )
        protected = tuple(ProtectedPart.model_validate(one.values()) for one in protected_in(self.area))
        return InMemory(launch=found.key, parts=parts, protected=protected, keeper=self.address)

    def leave(self, *, job_is_over: bool) -> None:
        """Let the keeper live on for the next agent, or end it with all that it keeps."""
        if self._process is not None:
            if job_is_over:
                self._process.end()
            else:
                self._process.leave()
            self._process = None
        self._launch = None

    def _start(self, launch: str) -> None:
        self._tried_s = time.monotonic()
        try:
            secret = keeper_secret(self._token, launch)
            self._process = KeeperProcess(
                self.area, launch, self._log, host=self._address, secret=secret, slots=self._slots
            )
        except OSError as error:  # another agent of this node may not have gone yet
            if str(error) != self._why_missing:
                print(f"no keeper, so workers make no snapshots: {error}", flush=True)
            self._why_missing = str(error)
            return
        how = "found" if self._process.is_adopted else "started"
        print(f"{how} the keeper of this node in {self.area}", flush=True)

    def _look(self) -> None:
        if self._process is None:
            if self._launch is not None and time.monotonic() - self._tried_s > _AGAIN_S:
                self._start(self._launch)
                if self.is_there:
                    text = f"the keeper of snapshots could not be started: {self._why_missing}; it is there now"
                    self._noticed.append((KEEPER_LOST, text))
            return
        if not self._process.look():
            self._told_rotten = 0
            text = f"the keeper of snapshots: {self._process.lost_because}; another one is started"
            self._noticed.append((KEEPER_LOST, text))
        rotten = self._process.told.get("rotten", [])
        for text in rotten[self._told_rotten :]:
            self._noticed.append(
                ("snapshot damaged", f"memory of a snapshot has changed, and nobody will use it: {text}")
            )
        self._told_rotten = len(rotten)

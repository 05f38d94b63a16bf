"""The keeper of a node, as its agent sees to it: started for a launch, started again if it dies, ended with the job."""

from collections.abc import Sequence
from pathlib import Path

from evermesh.fault.snapshot.handshake import Address
from evermesh.fault.snapshot.keeper.area import area_of, identity_in
from evermesh.fault.snapshot.keeper.keeper import inventory
from evermesh.fault.snapshot.keeper.layouts import groups_in
from evermesh.fault.snapshot.keeper.process import KeeperProcess
from evermesh.fault.snapshot.keeper.serving import address_in
from evermesh.fault.snapshot.remote import Keepers
from evermesh.launcher.contact import keeper_secret
from evermesh.launcher.messages import InMemory, KeeperAt, SnapshotPart


class NodeKeeper:
    """The keeper of ``node`` in ``run``, if workers leave snapshots there. It outlives this agent, unless the job is over.

    Others reach it at ``address``, with a secret that follows from the ``token`` of the run.
    """

    def __init__(self, run: Path, node: str, address: str, token: str) -> None:
        self._address, self._token = address, token
        self._area, self._log = area_of(run, node), run / "logs" / f"keeper-{node}.log"
        self._process: KeeperProcess | None = None
        self._launch: str | None = None

    def keep_for(self, launch: str | None) -> Path | None:
        """Where the workers of a launch leave snapshots; None: nowhere, because they do not want to, or no keeper can be
        started. Training goes on without."""
        if launch is None:
            return None
        if self._process is None or launch != self._launch:
            self.leave(job_is_over=False)
            try:
                secret = keeper_secret(self._token, launch)
                self._process = KeeperProcess(self._area, launch, self._log, host=self._address, secret=secret)
            except OSError as error:  # another agent of this node may not have gone yet
                print(f"no keeper, so workers make no snapshots: {error}", flush=True)
                return None
            self._launch = launch
            how = "found" if self._process.is_adopted else "started"
            print(f"{how} the keeper of this node in {self._area}", flush=True)
        return self._area

    def look(self) -> None:
        """Called now and then: a keeper that has died is started again, and finds what the one before it has left."""
        if self._process is not None and not self._process.look():
            print("the keeper had died: another one is started", flush=True)

    @property
    def address(self) -> KeeperAt | None:
        """Where other nodes read; None: nowhere, or it does not listen yet."""
        found = address_in(self._area) if self._process is not None else None
        return KeeperAt(host=found.host, port=found.port) if found is not None else None

    def others(self, launch: str | None, keepers: Sequence[KeeperAt]) -> Keepers | None:
        """What workers need to read the memory of all nodes; None: they make no snapshots."""
        if launch is None:
            return None
        addresses = tuple(Address(keeper.host, keeper.port) for keeper in keepers)
        return Keepers(addresses, launch, keeper_secret(self._token, launch))

    def in_memory(self) -> InMemory | None:
        """What ranks have left in memory, also before this agent; None if there is nothing."""
        found = identity_in(self._area)
        if found is None:
            return None
        self.look()
        worlds = {(group.generation, group.shard_map): group.world_size for group in groups_in(self._area)}
        parts = tuple(
            SnapshotPart(
                rank=part["rank"],
                generation=part["generation"],
                step=part["step"],
                shard_map=part["shard_map"],
                world_size=worlds.get((part["generation"], part["shard_map"])),
            )
            for part in inventory(self._area)
        )
        return InMemory(launch=found.key, parts=parts, keeper=self.address)

    def leave(self, *, job_is_over: bool) -> None:
        """Let the keeper live on for the next agent, or end it with all that it keeps."""
        if self._process is not None:
            if job_is_over:
                self._process.end()
            else:
                self._process.leave()
            self._process = None

"""What the ranks of an attempt find in the memory of nodes: looked for before it begins, made whole before they start,
protected while they train.

waiting for nodes ──► what keepers hold (``reach.py``) ──► an attempt begins: guests for what nobody replaces (``guests.py``)
    ──► keepers take the places of the attempt, and rebuild (``stripes.py``) ──► ranks start ──► guests end
"""

from collections.abc import Sequence

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.controller.guests import Guests
from evermesh.launcher.controller.in_memory import complete_step, newest_of, recovery_of, remembered_step
from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.machine import size_of_attempt
from evermesh.launcher.controller.nodes import Node
from evermesh.launcher.controller.reach import Reach
from evermesh.launcher.controller.status import Standing
from evermesh.launcher.controller.stripes import Stripes
from evermesh.launcher.controller.work import newest_step
from evermesh.launcher.messages import KeeperTells
from evermesh.runtime.telemetry import StepReport

_NO_SNAPSHOT_STEPS = 100
"""An attempt in another layout makes its first snapshot behind its first step. Where none is complete by then there is no
room for one, and guests only take what there is."""


class AttemptMemory:
    """The memory of the nodes of ``job``, from one attempt to the next."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.reach: Reach | None = None
        """Of the memory of all nodes, while the job waits for nodes and may go on with fewer."""
        self._guests: Guests | None = None
        self._stripes: Stripes | None = None

    @property
    def protection(self) -> Standing:
        """Of the newest snapshot, by the memory of other nodes."""
        return self._stripes.protection if self._stripes is not None else "none"

    @property
    def is_ready(self) -> bool:
        """Whether all is there that can be had, so that ranks may start."""
        return self._stripes is not None and self._stripes.are_ready

    @property
    def has_failed(self) -> bool:
        """Whether something that was to be rebuilt is not there."""
        of_stripes = self._stripes is not None and self._stripes.has_failed
        return of_stripes or (self._guests is not None and self._guests.has_failed)

    @property
    def is_looking(self) -> bool:
        """Whether it is not known yet what fewer nodes than before would find."""
        is_smaller = size_of_attempt(self._job.view()) != self._job.config.nodes
        return is_smaller and self.reach is not None and not self.reach.is_known

    @property
    def step(self) -> int | None:
        """Of the newest snapshot that is whole, once it is ready; None: there is none."""
        job, stripes = self._job, self._stripes
        anywhere = complete_step(job.nodes, job.config, job.record.started_s)
        return newest_of(stripes.remembered() if stripes is not None else None, anywhere)

    def guests_for(self, nodes: Sequence[str]) -> Guests:
        """The guests, if any, that an attempt on these nodes needs, whose generation the scribe has."""
        job = self._job
        saved, reached = newest_step(job.run) or 0, self.reach.newest if self.reach is not None else None

        def is_worth(version: Version) -> bool:
            if version.step < saved or (reached is not None and version <= reached):
                return False
            own = recovery_of(job.nodes, nodes, job.config, job.record.started_s)
            return own is None or version > own.version

        return Guests(job, nodes, f"guest-{job.scribe.generation}", is_worth)

    def step_for(self, nodes: Sequence[str], guests: Guests) -> int | None:
        """Of the newest snapshot that will be whole for an attempt on these nodes; None: there is none."""
        job = self._job
        return newest_of(guests.step, remembered_step(job.nodes, nodes, job.config, job.record.started_s))

    def begin(self, guests: Guests) -> None:
        """The attempt has begun for which these are."""
        self.reach, self._guests, self._stripes = None, guests, None
        guests.begin()
        self._prepare()

    def greet(self, node: Node) -> None:
        """A node is there, perhaps again."""
        if self._stripes is not None:
            self._stripes.greet(node)
        elif self._guests is not None:
            self._guests.greet(node)

    def hear(self, node: Node, told: KeeperTells) -> None:
        """An agent tells of its keeper, or of one that it hosts."""
        if self._stripes is None and self._guests is not None:
            self._guests.hear(node, told)
        elif self._stripes is not None and told.guest is None:
            self._stripes.hear(node, told)

    def look(self) -> None:
        """Called now and then: begin what can be begun by now, and wait for nothing that takes too long."""
        job, keepers = self._job, self._job.nodes.keepers
        if job.state == "waiting" and job.fewer_nodes and self.reach is None and keepers:
            self.reach = Reach(keepers, job.launch, job.keeper_secret)
        self._prepare()
        if self._stripes is not None and job.life is not None and not job.life.is_ending:
            self._stripes.look()

    def end_guests(self, report: StepReport) -> None:
        """What they keep is not needed once there is a complete snapshot of this attempt, or if there will be none."""
        life, nodes = self._job.life, self._job.nodes
        restored = (life.remembered if life else None) or 0
        if report.snapshot.committed or report.step > restored + _NO_SNAPSHOT_STEPS:
            nodes.end_guests(list(nodes.guests))

    def _prepare(self) -> None:
        """Once guests have what was lost with nodes that nobody replaces, keepers take the places of the attempt."""
        job, life = self._job, self._job.life
        if life is None or life.is_ending or self._stripes is not None:
            return
        if self._guests is None:  # an earlier controller began it, and may have been killed before that was done
            self._guests = self.guests_for(life.nodes)
            if not life.is_started and not life.has_stepped:
                self._guests.begin()
        self._guests.look()
        if not self._guests.is_under_way:
            self._stripes = Stripes(job.nodes, life, job.config, job.scribe, job.launch, newest_step(job.run))
            self._stripes.begin()

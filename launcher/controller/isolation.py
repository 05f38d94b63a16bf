"""Which nodes the job does not use, because somebody or the policy says so; what is learnt of nodes is kept for other jobs.

findings, health, dead ranks, lost nodes ──► evidence ──► cluster store ──► decide (``fault/isolation``)
    ──► event ``isolation``; in mode ``act`` also: degrade ──► speeds to rank 0, which plans
                                                   drain ──► regrouping without the node
                                                   replace ──► as if it was lost
cordons of the store, drains that were asked for ──► ``Job.aside``: no other attempt uses these nodes
"""

import time
from collections.abc import Sequence

from evermesh.fault.cluster.records import Evidence, shortened
from evermesh.fault.cluster.standing import evidence_against, records_by_node
from evermesh.fault.cluster.store import cluster_place
from evermesh.fault.events import Finding
from evermesh.fault.isolation.costs import Action, Performance
from evermesh.fault.isolation.deciding import Choice, Observed, Spent, decide, is_suspected
from evermesh.fault.isolation.meanings import KEEPER_LOST, meaning_of
from evermesh.launcher.chaos.record import read_injection
from evermesh.launcher.controller.cluster_desk import ClusterDesk
from evermesh.launcher.controller.degraded import Degraded
from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.measured_costs import MeasuredCosts
from evermesh.launcher.controller.node_evidence import (
    Against,
    HealthVerdict,
    of_failure,
    of_findings,
    of_verdicts,
    slowdown_of,
)
from evermesh.launcher.controller.setting_aside import SettingAside, Wish, names_of
from evermesh.launcher.controller.status import ENDED

_DECIDE_S = 10.0
_SET_ASIDE_S = 1.0
_AGAIN_S = 300.0
"""How often the same about the same node is evidence, at least: twice in the time for which it must be late."""
_STANDS_STILL_S = 30.0


class Isolation:
    """Sets nodes of ``job`` aside. Everything is called from the controller's loop."""

    def __init__(self, job: Job) -> None:
        self._job, self._config = job, job.config.isolation
        place = job.config.cluster or str(cluster_place())
        blames = read_injection(job.run) is None  # no machine is at fault where faults are made on purpose
        self._desk = ClusterDesk(place, self._say, keeps=blames)
        self._desk.recall(job.record.evidence)
        self._aside, self._costs, self._degraded = SettingAside(job, self._desk), MeasuredCosts(job), Degraded(job)
        self._seen_s: dict[tuple[str, str], float] = {}
        self._hung_s: dict[str, float] = {}
        """When a node was last found to be what a job waits for."""
        self._counted = 0
        """The last attempt whose failure is evidence."""
        self._decided_s = self._looked_s = float("-inf")
        self._told: dict[str, tuple[Action, str]] = dict.fromkeys(job.record.slowed, ("degrade", ""))
        self._there: set[tuple[str, int | None]] = set()
        """Nodes that are ready, and their agents."""

    @property
    def is_looking(self) -> bool:
        """Whether it is not known yet which nodes are cordoned."""
        return not self._desk.is_known

    def on_findings(self, findings: Sequence[Finding]) -> None:
        """Detectors have found these by now; what they found before may be among them again."""
        names = {known: node.name for node in self._job.nodes for known in names_of(node)}
        for finding in findings:
            for against in of_findings([finding], self._job.life, names):
                self._note(against)
                if (times := slowdown_of(finding)) is not None:
                    self._degraded.note_slow(against.node, times)
                if meaning_of(finding.kind).source == "hang":
                    self._hung_s[against.node] = time.monotonic()

    def on_verdicts(self, node: str, verdicts: Sequence[HealthVerdict]) -> None:
        """Health checks on ``node`` say this now."""
        for against in of_verdicts(node, verdicts):
            self._note(against)

    def on_noticed(self, node: str, event: str, text: str) -> None:
        """An agent has noticed something on its node."""
        if event == KEEPER_LOST:
            self._note(Against(node, KEEPER_LOST, 1.0, 1.0, text))

    def drain(self, name: str, by: str, because: str) -> str:
        """Go on without a node, see ``SettingAside.drain``. Raises ``DrainRefused``."""
        return self._aside.drain(name, by, because)

    def look(self) -> None:
        """Called now and then, behind the history of failures and before anything is decided: note what failed, see what is
        cordoned, decide what is due."""
        self._desk.look()
        self._costs.look()
        self._note_failure()
        there = {(node.name, node.pid) for node in self._job.nodes if node.state == "ready"}
        if there != self._there:  # nobody is placed on a node before it is known who it is
            self._there, self._looked_s, self._decided_s = there, float("-inf"), float("-inf")
        now_s = time.monotonic()
        if now_s - self._looked_s > _SET_ASIDE_S:
            self._looked_s = now_s
            for name in self._aside.look():
                self._told.pop(name, None)  # what is decided from now on is new
            self._costs.note_computing()
        if self._config is not None and now_s - self._decided_s > _DECIDE_S and self._job.state not in ENDED:
            self._decided_s = now_s
            self._decide()
        self._degraded.look()

    def close(self) -> None:
        """The job is over: what waits is written."""
        self._desk.close()

    def _say(self, problem: str) -> None:
        self._job.scribe.tell("cluster store", problem)

    def _note_failure(self) -> None:
        job, life = self._job, self._job.life
        if life is None or not life.is_counted or job.generation == self._counted:
            return
        self._counted = job.generation
        self._costs.forget_computing()
        for against in of_failure(life):
            self._add(against, f"{job.run.name}-{job.launch}-{job.generation}-{against.node}-{against.kind}")
        self._looked_s = self._decided_s = float("-inf")

    def _note(self, against: Against) -> None:
        """Evidence, unless it is what was said a moment ago."""
        if self._config is None:
            return
        now_s, key = time.monotonic(), (against.node, against.kind)
        if now_s - self._seen_s.get(key, float("-inf")) < min(_AGAIN_S, self._config.persist_s / 2):
            return
        self._seen_s[key] = now_s
        self._add(against, None)
        self._decided_s = float("-inf")

    def _add(self, against: Against, number: str | None) -> None:
        node = self._job.nodes[against.node]
        if self._config is None or node.identity is None:
            return
        record = Evidence(
            time_s=time.time(),
            node=node.identity,
            kind=against.kind,
            weight=against.weight,
            confidence=against.confidence,
            job=self._job.run.name,
            launch=self._job.launch,
            text=shortened(against.text),
        )
        record = record if number is None else record.model_copy(update={"id": number})
        self._job.scribe.note("evidence", record.text, evidence=record.model_dump(mode="json"))
        self._desk.add(record)

    def _decide(self) -> None:
        assert self._config is not None
        job, now_s = self._job, time.time()
        nodes = {
            node.identity.name: (node.name, node.identity)
            for node in job.nodes
            if node.identity is not None and node.name not in job.aside and node.state == "ready"
        }
        records = records_by_node(self._desk.records, nodes)
        observed = [
            Observed(name, evidence_against(identity, records[identity.name]), self._performance(name))
            for name, identity in nodes.values()
        ]
        alone = sum(drained.by is None for drained in job.record.drained.values())
        spent = Spent(tuple(job.record.isolated_s), alone, len(job.nodes.states()))
        choices = decide(observed, self._costs.now(), self._config, spent, now_s)
        job.suspected = {choice.node: choice.suspicion.probability for choice in choices if is_suspected(choice)}
        for choice in choices:
            self._follow(choice)

    def _performance(self, node: str) -> Performance:
        life = self._job.life
        is_used = life is not None and node in life.nodes and not life.is_counted
        slowdown, degraded_s = self._degraded.slowdown_of(node), self._degraded.degraded_for_s(node)
        return Performance(
            slowdown=slowdown,
            residual=1.0 if degraded_s is None else self._costs.residual_of(node, slowdown),
            degraded_s=degraded_s,
            is_used=is_used,
            stands_still=is_used and time.monotonic() - self._hung_s.get(node, float("-inf")) < _STANDS_STILL_S,
        )

    def _follow(self, choice: Choice) -> None:
        """Tell a decision that is another one than before, and carry it out, or not."""
        before, now = self._told.get(choice.node, ("nothing", "")), (choice.action, choice.held_back.partition(":")[0])
        if before == now:
            return
        self._carry_out(choice, was_degraded=before[0] == "degrade")
        self._told[choice.node] = now

    def _carry_out(self, choice: Choice, *, was_degraded: bool) -> None:
        assert self._config is not None
        acts = self._config.mode == "act"
        if choice.is_eviction and acts:
            why, cordon_for_s = choice.suspicion.told(), self._config.cordon_for_s
            wish = Wish(choice.action, choice.reason, why, cordon_for_s=cordon_for_s)
            self._aside.leave(self._job.nodes[choice.node], wish)
            return
        is_degraded = choice.action == "degrade" and acts and not self._job.config.train.deterministic
        if choice.action in ("nothing", "watch") and not choice.held_back and not was_degraded:
            return
        is_over = choice.action in ("nothing", "watch")
        why_not = "" if is_degraded or is_over else self._why_not(choice)
        again = "; its ranks get their whole share again" if was_degraded and is_over else ""
        self._job.scribe.tell(
            "isolation",
            f"{choice.reason}{why_not}{again}",
            node=choice.node,
            action=choice.action,
            by=None,
            carried_out=not why_not,
            because=choice.suspicion.told(),
            slowdown=round(self._degraded.slowdown_of(choice.node), 3),
        )
        if is_degraded:
            self._degraded.degrade(choice.node)
        elif was_degraded:
            self._degraded.restore(choice.node)
        if is_degraded or was_degraded:
            self._costs.forget_computing()

    def _why_not(self, choice: Choice) -> str:
        if choice.action == "degrade" and self._job.config.train.deterministic:
            return "; not done, for plans do not depend on what is measured (train.deterministic)"
        return f"; not done (isolation: advise). `evermesh drain {choice.node}` does it"

"""Nodes that no other attempt of a job is to use: because somebody has cordoned them for all jobs, or because this job leaves
them, as a person or its policy wants."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from evermesh.fault.cluster.identity import covers
from evermesh.fault.cluster.records import Cordon, Record, Uncordon, shortened
from evermesh.fault.cluster.standing import cordon_of, standing_cordons
from evermesh.fault.isolation.costs import Action
from evermesh.launcher.controller.cluster_desk import ClusterDesk
from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.nodes import Node
from evermesh.launcher.controller.record import Drained
from evermesh.launcher.controller.status import ENDED
from evermesh.launcher.controller.telling import told_cordon
from evermesh.launcher.errors import DrainRefused


class Wish(NamedTuple):
    """That a node be left, as a drain or at once."""

    action: Action
    text: str
    """What is told about it."""
    because: str
    by: str | None = None
    """Who wants that; None: the policy."""
    cordon_for_s: float | None = None
    """How long other jobs are kept from it; None: until somebody allows it again."""


class SettingAside:
    """Keeps ``Job.aside``, with what the cluster store says, and tells of it."""

    def __init__(self, job: Job, desk: ClusterDesk) -> None:
        self._job, self._desk = job, desk
        self._told: set[str] = set()

    def drain(self, name: str, by: str, because: str) -> str:
        """Go on without a node, from memory, behind the step under way; nobody uses it again until it is uncordoned. Returns
        what the job calls it.

        Raises:
            DrainRefused: there is no such node, or the job cannot go on without it. Nothing has changed.
        """
        job, view = self._job, self._job.view()
        node = next((node for node in job.nodes if name in names_of(node)), None)
        if node is None or job.state in ENDED:
            known = ", ".join(node.name for node in job.nodes)
            raise DrainRefused(f"{job.run.name} has no node {name}; it has {known}. It is {job.state}.")
        ready = [other for other, state in view.usable.items() if state == "ready" and other != node.name]
        least = min((view.nodes_needed, *view.fewer_nodes))
        if len(ready) < least:
            shrinks = "" if view.fewer_nodes else ", and min_nodes is not set"
            raise DrainRefused(
                f"without {node.name} {len(ready)} of {len(view.nodes)} nodes could be used, but {job.run.name} needs "
                f"{least}{shrinks}. Resume the run with spares, or with min_nodes, or stop it."
            )
        if node.name not in job.record.drained:
            self.leave(node, Wish("drain", f"{node.name} is drained by {by}: {because}", because, by))
        return node.name

    def look(self) -> list[str]:
        """See what is cordoned, and what is not any more; the nodes that may be used again."""
        job, words, aside, allowed = self._job, self._desk.words, dict[str, str](), list[str]()
        cordons = standing_cordons(words, time.time())
        for node in job.nodes:
            cordon = cordon_of(node.identity, cordons) if node.identity is not None else None
            if cordon is not None:
                aside[node.name] = told_cordon(node.name, cordon)
        for name, drained in list(job.record.drained.items()):
            if _is_lifted(job.nodes[name], drained, words):
                text = f"{name} may be used again: it was uncordoned"
                job.scribe.tell("isolation", text, node=name, action="return", by=None, carried_out=True, because="")
                del job.record.drained[name]
                allowed.append(name)
            else:
                aside[name] = drained.because
        job.aside = aside
        for name in aside.keys() - self._told - job.record.drained.keys():
            where = "; ranks that are there stay until the next attempt" if job.life and name in job.life.nodes else ""
            text = f"{aside[name]}: no rank is placed there{where}"
            job.scribe.tell("isolation", text, node=name, action="cordon", by=None, carried_out=True, because="")
        self._told = set(aside)
        return allowed

    def leave(self, node: Node, wish: Wish) -> None:
        """Set a node aside, in this job and for others, and have an attempt that uses it go on without it."""
        job, now_s = self._job, time.time()
        job.scribe.tell(
            "isolation",
            wish.text,
            node=node.name,
            action=wish.action,
            by=wish.by,
            carried_out=True,
            because=wish.because,
        )
        job.record.drained[node.name] = Drained(wish.text, now_s, wish.by)
        job.record.slowed.pop(node.name, None)
        job.aside = {**job.aside, node.name: wish.text}
        if wish.by is None:
            job.record.isolated_s.append(now_s)
        until_s = None if wish.cordon_for_s is None else now_s + wish.cordon_for_s
        if node.identity is not None:
            name, machine = node.identity.name, node.identity.machine
            cordoned = {
                "by": wish.by or f"the policy of {job.run.name}",
                "because": shortened(wish.because),
                "until_s": until_s,
            }
            self._desk.add(Cordon(time_s=now_s, node=name, machine=machine, **cordoned))
        if wish.action == "replace" and job.life is not None and node.name in job.life.nodes:
            job.life.lost.add(node.name)


def names_of(node: Node) -> set[str]:
    """All that people and detectors may call it."""
    identity = node.identity.name if node.identity is not None else ""
    return {node.name, identity, node.address} - {"", "127.0.0.1"}


def _is_lifted(node: Node, drained: Drained, records: Sequence[Record]) -> bool:
    """Whether somebody has uncordoned it since it was drained."""
    name = node.identity.name if node.identity is not None else node.name
    return any(
        isinstance(record, Uncordon) and record.time_s > drained.since_s and covers(record.node, name)
        for record in records
    )

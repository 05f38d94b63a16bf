"""What agents find out about the health of their nodes: who is refused, what is told, and who else wants to know."""

from collections.abc import Callable, Sequence

from evermesh.fault.health.verdicts import Verdict, changed
from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.nodes import Node

OnVerdicts = Callable[[str, Sequence[Verdict]], None]
"""(node, what has changed for better or worse) -> None."""


class Health:
    """The health of the nodes of ``job``. Nodes that take part in an attempt are never refused here: what follows from
    evidence against them is for others to decide, who are in ``listeners``."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.listeners: list[OnVerdicts] = []

    def take(self, node: Node, verdicts: Sequence[Verdict]) -> None:
        """An agent tells all that is known of its node; it may tell it again."""
        new = changed({verdict.check: verdict for verdict in node.verdicts}, verdicts)
        node.verdicts = tuple(verdicts)
        for verdict in new:
            self._tell(node.name, verdict)
        if new:
            for listen in self.listeners:
                listen(node.name, new)
        self._admit(node)

    def _tell(self, node: str, verdict: Verdict) -> None:
        self._job.scribe.tell(
            "health",
            f"{node}: {verdict.told}",
            node=node,
            check=verdict.check,
            state=verdict.state,
            numbers=dict(verdict.numbers),
        )

    def _admit(self, node: Node) -> None:
        """Refuse a node that is not fit, and take it back when it is."""
        job, is_fit = self._job, not node.unfit_because
        takes_part = job.life is not None and node.name in job.life.nodes and node.name not in job.life.lost
        if node.state == "refused" and is_fit:
            node.state = "ready"
            job.scribe.tell("node back", f"{node.name} is fit again", node=node.name)
        elif node.state == "ready" and not is_fit and not takes_part and job.config.preflight != "off":
            node.state = "refused"
            job.scribe.tell(
                "node refused", f"{node.name} ({node.host}) is not used. {node.unfit_because}", node=node.name
            )
            self._end_if_hopeless()

    def _end_if_hopeless(self) -> None:
        """Before the first attempt: if too few nodes can still become ready, nobody need wait for them."""
        job = self._job
        possible = [node for node in job.nodes if node.state not in ("refused", "lost")]
        needed = min((job.config.nodes, *job.fewer_nodes))
        if job.life is None and len(possible) < needed:
            job.roster.refusal = (
                f"{len(possible)} nodes are left, but the job needs {needed}. {job.nodes.refused} Mend that, give "
                "the job spares, or set preflight to off if you know better (--set preflight=off)."
            )

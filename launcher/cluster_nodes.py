"""Showing and changing what the cluster store says of nodes, whether any job runs or not."""

import json
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from evermesh.fault.cluster.identity import covers, full_name
from evermesh.fault.cluster.records import Cordon, Evidence, Uncordon, shortened, who
from evermesh.fault.cluster.standing import NodeHistory, known_nodes, standing_cordons
from evermesh.fault.cluster.store import ClusterStore, Contents, cluster_place
from evermesh.fault.isolation.meanings import meaning_of
from evermesh.fault.isolation.suspicion import suspicion_of
from evermesh.launcher.errors import ClusterRequestInvalid
from evermesh.launcher.progress import duration
from evermesh.launcher.terminal import print_table

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SUSPECT = 0.3
"""Probability that it is at fault from which on a node is called suspect."""


def show_cluster(place: str | None, *, as_json: bool) -> None:
    """Print all nodes of which something is known."""
    store, now_s = ClusterStore(cluster_place(place)), time.time()
    nodes = known_nodes(_read(store).records, now_s)
    if as_json:
        print(json.dumps([_row(node, now_s) for node in nodes], indent=1))
    elif nodes:
        print_table(_nodes_table(nodes, now_s))
    else:
        print(f"nothing is known of any node in {store.place}")


def show_why(place: str | None, given: str, *, as_json: bool) -> None:
    """Print what speaks against a node, oldest first, and its cordon.

    Raises:
        ClusterRequestInvalid: nothing is known of such a node.
    """
    store, now_s, name = ClusterStore(cluster_place(place)), time.time(), full_name(given)
    known = known_nodes(_read(store).records, now_s)
    found = [node for node in known if covers(name, node.node.name)]
    if not found:
        names = ", ".join(node.node.name for node in known) or "none"
        raise ClusterRequestInvalid(f"nothing is known of {name} in {store.place}. Known there: {names}.")
    if as_json:
        print(json.dumps([_row(node, now_s) | _chain(node) for node in found], indent=1))
        return
    for node in found:
        suspicion = suspicion_of(node.evidence, now_s)
        print(f"{node.node.name}: {_state(node, now_s)}; {suspicion.told()} that it is at fault")
        if node.cordon is not None:
            print(f"  {_told(node.cordon)}")
        for one in node.evidence:
            print(f"  {_told_evidence(one, now_s)}")


def cordon_node(place: str | None, given: str, because: str, lasting: str | None) -> str:
    """Keep jobs from a node; what to tell about it.

    Raises:
        ClusterRequestInvalid: there is no reason, or the time is none.
    """
    if not because.strip():
        raise ClusterRequestInvalid("a cordon needs a reason: --because TEXT.")
    now_s, store, name = time.time(), ClusterStore(cluster_place(place)), full_name(given)
    until_s = None if lasting is None else now_s + _seconds(lasting)
    found = Cordon(time_s=now_s, node=name, by=who(), because=shortened(because), until_s=until_s)
    store.add([found])
    return f"{_told(found)}. Jobs that use {store.place} place no ranks there from their next attempt on."


def uncordon_node(place: str | None, given: str, because: str) -> str:
    """Allow jobs a node again; what to tell about it."""
    now_s, store, name = time.time(), ClusterStore(cluster_place(place)), full_name(given)
    before = standing_cordons(_read(store).records, now_s)
    store.add([Uncordon(time_s=now_s, node=name, by=who(), because=shortened(because))])
    lifted = [cordon for cordon in before if covers(name, cordon.node)]
    left = [cordon for cordon in before if cordon not in lifted and covers(cordon.node, name)]
    text = f"{name} may be used again" if lifted else f"{name} was not cordoned; what spoke against it is forgiven"
    return text if not left else f"{name} may not be used yet: {_told(left[0])}. Uncordon {left[0].node} as a whole."


def _read(store: ClusterStore) -> Contents:
    found = store.read()
    for problem in found.problems:
        print(problem, file=sys.stderr)
    return found


def _seconds(given: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", given.strip())
    if found is None or float(found[1]) <= 0:
        raise ClusterRequestInvalid(f"--for {given} is no time. Give a number with s, m, h or d, such as 2h.")
    return float(found[1]) * _UNITS[found[2]]


def _nodes_table(nodes: Sequence[NodeHistory], now_s: float) -> Table:
    columns = ("node", "state", "at fault", "evidence", "newest", "cordon")
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for node in nodes:
        row, newest = _row(node, now_s), node.evidence[-1] if node.evidence else None
        table.add_row(
            node.node.name,
            row["state"],
            f"{row['probability']:.2f}",
            str(len(node.evidence)),
            f"{newest.kind}, {duration(now_s - newest.time_s)} ago" if newest is not None else "",
            _told(node.cordon) if node.cordon is not None else "",
        )
    return table


def _row(node: NodeHistory, now_s: float) -> dict[str, Any]:
    suspicion = suspicion_of(node.evidence, now_s)
    return {
        "node": node.node.name,
        "machine": node.node.machine,
        "state": _state(node, now_s),
        "probability": round(suspicion.probability, 4),
        "by_source": {source: round(found, 4) for source, found in suspicion.by_source.items()},
        "evidence": len(node.evidence),
        "newest": node.evidence[-1].model_dump(mode="json") if node.evidence else None,
        "cordon": node.cordon.model_dump(mode="json") if node.cordon is not None else None,
    }


def _chain(node: NodeHistory) -> dict[str, Any]:
    return {"chain": [one.model_dump(mode="json") for one in node.evidence]}


def _state(node: NodeHistory, now_s: float) -> str:
    if node.cordon is not None:
        return "cordoned"
    return "suspect" if suspicion_of(node.evidence, now_s).probability >= _SUSPECT else "ok"


def _told(cordon: Cordon) -> str:
    until = "" if cordon.until_s is None else f" until {datetime.fromtimestamp(cordon.until_s, UTC):%Y-%m-%d %H:%M} UTC"
    return f"{cordon.node} is cordoned{until} by {cordon.by}: {cordon.because}"


def _told_evidence(one: Evidence, now_s: float) -> str:
    meaning = meaning_of(one.kind)
    when = f"{datetime.fromtimestamp(one.time_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    fades = 0.5 ** (max(0.0, now_s - one.time_s) / meaning.half_life_s)
    says = meaning.precision * one.weight * one.confidence
    return f"{when}  {one.kind} ({meaning.source}, says {says:.2f}, {fades:.0%} left)  {one.job}: {one.text}"

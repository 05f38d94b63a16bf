"""The delay matrix between nodes: what sampled messages measured, and what findings name of sources, destinations, links."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from evermesh.fault.detectors import kinds
from evermesh.fault.events import Finding
from evermesh.launcher.controller.status import JobStatus


class Cell(NamedTuple):
    """A part of the matrix that takes longer than the rest."""

    source: str | None
    """Node that sends; None: any, the whole column is meant."""
    target: str | None
    """Node that receives; None: any, the whole row is meant."""
    ratio: float | None
    """Times as long as others of their size; None: it was not measured as a ratio."""
    text: str


def delays_of(status: JobStatus) -> Mapping[str, Any]:
    """What the section ``delays`` holds, as lists: ``cells`` that findings name, and ``measured``: source, target, ratio to
    ways in the middle, messages; the longest first."""
    node_of = {rank.rank: rank.node for rank in status.ranks}
    return {
        "cells": [list(cell) for finding in status.findings for cell in _cells(finding, node_of)],
        "measured": [[of.source, of.target, of.ratio, of.messages] for of in status.delays],
    }


def _cells(finding: Finding, node_of: Mapping[int, str]) -> Iterator[Cell]:
    ratio = finding.evidence.get("ratio")
    known = float(ratio) if isinstance(ratio, int | float) else None
    node = finding.node or node_of.get(-1 if finding.rank is None else finding.rank)
    if finding.kind in (kinds.SLOW_SOURCE, kinds.SLOW_NODE) and node is not None:
        yield Cell(node, None, known, finding.text)
    if finding.kind in (kinds.SLOW_DESTINATION, kinds.SLOW_NODE) and node is not None:
        yield Cell(None, node, known, finding.text)
    if finding.kind == kinds.SLOW_LINK and finding.link is not None:
        for source, target in _directions(finding):
            if source in node_of and target in node_of:
                yield Cell(node_of[source], node_of[target], known, finding.text)


def _directions(finding: Finding) -> list[tuple[int, int]]:
    """Ranks from and to: the one way that is slow, or both where nobody told them apart."""
    source, target = finding.evidence.get("from"), finding.evidence.get("to")
    if isinstance(source, int) and isinstance(target, int):
        return [(source, target)]
    assert finding.link is not None
    return [finding.link, finding.link[::-1]]

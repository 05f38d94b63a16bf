"""What a watcher found of many cases, as a table per kind and as JSON."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evermesh.fault.events import Finding
from tests.fault.suite.cases import FAULTS
from tests.fault.suite.running import Outcome

_HEAD = ("kind", "jobs", "found", "said", "wrong", "diagnose finds", "p50 s", "p95 s")


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """One case, as plain values."""
    case = outcome.case
    return {
        "kind": case.kind,
        "ranks": case.job.world_size,
        "seed": case.seed,
        "dp": case.job.dp,
        "tp": case.job.tp,
        "pp": case.job.pp,
        "flavour": case.job.flavour,
        "plain": case.job.is_plain,
        "rank": case.fault.rank if case.fault else None,
        "found": outcome.is_found,
        "early": outcome.is_early,
        "by": outcome.by,
        "waited_s": outcome.waited_s,
        "right": [_said(one) for one in outcome.right],
        "wrong": [_said(one) for one in outcome.wrong],
        "diagnose_found": outcome.is_found_after,
        "diagnose": [_said(one) for one in outcome.after],
        "logs": outcome.logs,
    }


def _said(finding: Finding) -> dict[str, Any]:
    return finding.model_dump(exclude_none=True, exclude={"evidence"})


def score(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Precision of all findings, recall of all faults, findings where there is no fault, and seconds until a finding."""
    faults = [one for one in outcomes if one.case.kind in FAULTS]
    said = sum(len(one.seen) for one in outcomes)
    return {
        "jobs": len(outcomes),
        "faults": len(faults),
        "recall": _share(sum(one.is_found for one in faults), len(faults)),
        "precision": _share(said - sum(len(one.wrong) for one in outcomes), said),
        "innocents": len(outcomes) - len(faults),
        "innocents_blamed": sum(bool(one.seen) for one in outcomes if one.case.kind not in FAULTS),
        "diagnose_recall": _share(sum(one.is_found_after for one in faults), len(faults)),
        "seconds_p50": _quantile(outcomes, 0.5),
        "seconds_p95": _quantile(outcomes, 0.95),
    }


def table(outcomes: Sequence[Outcome]) -> str:
    """A row per kind in the order of the cases, and one of all."""
    kinds = list(dict.fromkeys(one.case.kind for one in outcomes))
    rows = [_HEAD, *(_row(kind, [one for one in outcomes if one.case.kind == kind]) for kind in kinds)]
    rows.append(_row("all", list(outcomes)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _row(kind: str, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    seconds = [f"{value:.2f}" if (value := _quantile(outcomes, at)) is not None else "" for at in (0.5, 0.95)]
    return (
        kind,
        str(len(outcomes)),
        str(sum(one.is_found for one in outcomes)),
        str(sum(len(one.seen) for one in outcomes)),
        str(sum(len(one.wrong) for one in outcomes)),
        str(sum(one.is_found_after for one in outcomes)),
        *seconds,
    )


def _quantile(outcomes: Sequence[Outcome], at: float) -> float | None:
    waits = [one.waited_s for one in outcomes if one.is_found and one.waited_s is not None]
    return float(np.quantile(waits, at)) if waits else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None

"""Copies of parameters: ranks that hold others' bits are named, on every layout."""

from pathlib import Path
from typing import Any

import pytest

from evermesh.fault.events import Finding, read_events
from evermesh.runtime import TrainConfig
from evermesh.runtime.parameter_set import within
from evermesh.runtime.trainer import Trainer
from tests.cluster import RankFailed, run_ranks
from tests.runtime.guard.test_probe import flipped
from tests.runtime.guard.training import config_of

BAD_STEP = 4


def _fit(rank: int, workers: int, config: TrainConfig, directory: Path, bad_rank: int | None, alike: bool) -> None:
    """Before the update of step 4 a bit of what ``bad_rank`` holds is another one: of what all sharers hold, or not."""
    trainer = Trainer(config, directory=directory)
    findings = trainer.integrity.findings

    def with_flip(step: int) -> list[Finding]:
        of = trainer.built.sets[0]
        if rank == bad_rank and step == BAD_STEP:
            at = within(of.flat.replicated, of.flat.parameter_part(of.owners.rank)).start if alike else 3
            of.kept_values.copy_(flipped(of.kept_values, at))
        return findings(step)

    trainer.integrity.findings = with_flip  # type: ignore[method-assign]
    trainer.fit()


def _run(corpus: Path, directory: Path, layout: dict[str, Any], bad_rank: int | None, **options: Any) -> list[Finding]:
    guard = {"replicas": {"every": 2, "on_mismatch": options.pop("on_mismatch", "continue")}}
    config = config_of(corpus, {"capacity": 300} | layout, steps=5, guard=guard)
    run_ranks(config.layout.world_size, _fit, config, directory, bad_rank, options.get("alike", False))
    events = [event for event in read_events(directory / "events.jsonl") if event.kind == "finding"]
    assert all(event.step == BAD_STEP for event in events)
    return [Finding.model_validate(event.fields["finding"]) for event in events]


def _told(findings: list[Finding]) -> list[tuple[int | None, object, float]]:
    return [(finding.rank, finding.evidence["holders"], finding.confidence) for finding in findings]


def test_of_three_copies_the_one_that_differs_is_named(corpus: Path, tmp_path: Path) -> None:
    assert _told(_run(corpus, tmp_path, {"hdp": 3}, 1)) == [(1, [0, 1, 2], 0.95)]


def test_of_two_copies_both_are_suspected_and_a_run_that_says_so_ends(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"CorruptionFound: rank 0 holds other bits .*; rank 1 holds other bits"):
        _run(corpus, tmp_path, {"hdp": 2}, 1, on_mismatch="stop")
    findings = [event for event in read_events(tmp_path / "events.jsonl") if event.kind == "finding"]
    assert [Finding.model_validate(event.fields["finding"]).confidence for event in findings] == [0.5, 0.5]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("layout", "bad_rank", "alike", "told"),
    [
        ({"hdp": 2, "tp": 2}, 2, True, [(0, [0, 2], 0.5), (2, [0, 2], 0.5), (2, [0, 1, 2, 3], 0.95)]),
        ({"hdp": 2, "tp": 2}, 2, False, [(0, [0, 2], 0.5), (2, [0, 2], 0.5)]),
        ({"hdp": 4, "sharding": {"parameters": 2, "gradients": 2}}, 3, False, [(1, [1, 3], 0.5), (3, [1, 3], 0.5)]),
        ({"hdp": 4, "sharding": {"parameters": "all", "gradients": "all"}}, 3, False, []),
        ({"pp": 2, "hdp": 2}, 3, False, [(2, [2, 3], 0.5), (3, [2, 3], 0.5)]),
        ({"pp": 2, "tp": 2, "capacity": 600}, None, False, []),
    ],
)
def test_who_holds_copies_is_known_of_every_layout(
    layout: dict[str, Any],
    bad_rank: int | None,
    alike: bool,
    told: list[tuple[int, list[int], float]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    assert sorted(_told(_run(corpus, tmp_path, layout, bad_rank, alike=alike))) == sorted(told)

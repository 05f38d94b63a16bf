"""The probe: it changes no bit of a run, and finds one that a rank got wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evermesh.fault.events import Finding, read_events
from evermesh.runtime import TrainConfig, read_telemetry
from evermesh.runtime.guard.probe import Probed, bits
from evermesh.runtime.model.blocks import Block
from evermesh.runtime.trainer import Trainer
from tests.cluster import RankFailed, run_ranks
from tests.runtime.guard.training import MODEL, config_of

STEPS = 4
EXPERTS = {"experts": 4, "ffn": 16, "shared_ffn": 16, "balancing": {"kind": "bias", "rate": 0.01}}
ZERO_3 = {"parameters": "all", "gradients": "all"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "rings, recomputed": {"hdp": 2, "capacity": 260, "activations": "recompute"},
    "no bubbles": {"pp": 2, "schedule": "zero-bubble", "split": [2, 2]},
    "tensor parallel": {"hdp": 2, "tp": 2, "capacity": 300},
    "experts": {"hdp": 2, "ep": 2, "capacity": 300, "hot_experts": 1},
    "divided": {"hdp": 2, "capacity": 300, "sharding": ZERO_3},
    "divided in every micro-batch": {"hdp": 2, "capacity": 300, "sharding": ZERO_3 | {"keep_for": "micro_batch"}},
    "interleaved": {"pp": 2, "hdp": 2, "capacity": 300, "schedule": "interleaved-1f1b", "virtual_stages": 2},
}


def _config(corpus: Path, layout: dict[str, Any], **guard: Any) -> TrainConfig:
    model = MODEL | {"layers": 4} | ({"moe": EXPERTS} if "ep" in layout else {})
    return config_of(corpus, layout, model=model, steps=STEPS, guard={"spikes": False} | guard)


def _fit(rank: int, workers: int, config: TrainConfig, directory: Path) -> tuple[bytes, bytes, list[Probed]]:
    """All bits of parameters and of torch's random numbers at the end, and what was probed."""
    trainer = Trainer(config, directory=directory)
    probe, probed = trainer.integrity._probe, list[Probed]()
    if probe is not None:
        take = probe.take

        def watched() -> Probed:
            probed.append(take())
            return probed[-1]

        probe.take = watched  # type: ignore[method-assign]
    trainer.fit()
    parameters = b"".join(of.owned_values.detach().numpy().tobytes() for of in trainer.built.sets)
    return parameters, torch.get_rng_state().numpy().tobytes(), probed


@pytest.mark.parametrize(
    "layout",
    [*list(LAYOUTS)[:2], *(pytest.param(layout, marks=pytest.mark.parity) for layout in list(LAYOUTS)[2:])],
)
def test_a_run_with_probes_is_bit_for_bit_the_run_without(layout: str, corpus: Path, tmp_path: Path) -> None:
    found = {}
    for probe in (False, True):
        every = {"every": 1} if probe else None
        config, directory = _config(corpus, LAYOUTS[layout], probe=every, replicas=every), tmp_path / str(probe)
        directory.mkdir()
        found[probe] = run_ranks(config.layout.world_size, _fit, config, directory)
    assert [of_rank[:2] for of_rank in found[True]] == [of_rank[:2] for of_rank in found[False]]
    for _, _, probed in found[True]:
        assert len(probed) == STEPS
        assert all(of.differing == 0 and of.compared > 1000 for of in probed)
        assert len({of.layer for of in probed}) == (2 if "pp" in LAYOUTS[layout] else 4)
    reports = [read_telemetry(tmp_path / name / "telemetry.jsonl") for name in ("False", "True")]
    assert [report.traffic for report in reports[0]] == [report.traffic for report in reports[1]]
    assert [event.kind for event in read_events(tmp_path / "True" / "events.jsonl")] == [
        event.kind for event in read_events(tmp_path / "False" / "events.jsonl")
    ]


def flipped(values: Tensor, at: int) -> Tensor:
    """The same float64 values, with another bit of the mantissa of one: high enough not to be rounded away by a sum."""
    other = values.detach().clone()
    other.view(-1).view(torch.int64)[at] ^= 1 << 44
    return other


def _flip(rank: int, workers: int, config: TrainConfig, directory: Path, where: str) -> list[bool]:
    """Rank 1 gets a bit of layer 1 wrong in step 3, once; which steps were committed."""
    trainer = Trainer(config, directory=directory)
    block, todo = trainer.built.model.blocks["1"], [rank == 1]
    assert isinstance(block, Block)
    assert block.feed_forward is not None

    def once(gradient: Tensor) -> Tensor | None:
        if trainer.progress.step != 3 or not gradient.numel() or not todo[0]:
            return None
        todo[0] = False
        return flipped(gradient, 5)

    if where == "weight":
        block.feed_forward.gate.weight.register_hook(once)
    elif where == "activation":
        block.feed_forward.register_full_backward_hook(lambda _, gradients, __: _first(once, gradients))
    else:
        block.feed_forward.register_forward_hook(lambda _, __, output: _added(once, output))
    committed, train_step = [], trainer.train_step

    def watched(batch: Any) -> Any:
        outcome = train_step(batch)
        committed.append(outcome.committed)
        return outcome

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.fit()
    assert todo == [False]
    return committed


def _first(change: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    changed = change(gradients[0])
    return None if changed is None else (changed,)


def _added(change: Any, output: Tensor) -> Tensor | None:
    changed = change(output)
    return None if changed is None else output + (changed - output.detach())


def _flipping(corpus: Path, on_mismatch: str) -> TrainConfig:
    """The first probe is that of step 3, of layer 1."""
    return _config(corpus, {"hdp": 2, "capacity": 300}, probe={"every": 3, "on_mismatch": on_mismatch}, retry_within=1)


@pytest.mark.parametrize(
    "where", ["activation", *(pytest.param(where, marks=pytest.mark.parity) for where in ("weight", "output"))]
)
def test_one_flipped_bit_is_found_at_its_step_which_is_skipped(where: str, corpus: Path, tmp_path: Path) -> None:
    outcomes = run_ranks(2, _flip, _flipping(corpus, "skip"), tmp_path, where)
    assert outcomes == [[True, True, False, True]] * 2
    events = [event for event in read_events(tmp_path / "events.jsonl") if event.kind == "finding"]
    finding = Finding.model_validate(events[0].fields["finding"])
    assert (events[0].step, finding.kind, finding.rank) == (3, "silent corruption", 1)
    assert finding.evidence["layer"] == 1
    differing, compared = finding.evidence["differing_elements"], finding.evidence["compared_elements"]
    assert isinstance(differing, int)
    assert isinstance(compared, int)
    assert differing == 1 if where == "weight" else 1 <= differing < compared
    # what goes wrong before attention's backward pass travels around a ring
    assert len(events) == (2 if where == "activation" else 1)
    assert (finding.evidence["suspects"], finding.confidence) == ([1], 0.95)
    assert (finding.evidence["first_differing_tensor"] == 0) == (where == "output")


@pytest.mark.parametrize("on_mismatch", [pytest.param("continue", marks=pytest.mark.parity), "stop"])
def test_the_policy_says_what_follows(on_mismatch: str, corpus: Path, tmp_path: Path) -> None:
    config = _flipping(corpus, on_mismatch)
    if on_mismatch == "continue":
        assert run_ranks(2, _flip, config, tmp_path, "weight") == [[True] * STEPS] * 2
    else:
        with pytest.raises(RankFailed, match="CorruptionFound: rank 1 computed layer 1 twice, and 1 of"):
            run_ranks(2, _flip, config, tmp_path, "weight")
    assert [event.step for event in read_events(tmp_path / "events.jsonl") if event.kind == "finding"] == [3]


def test_bits_tell_apart_what_numbers_do_not() -> None:
    zeros, numbers = torch.tensor([0.0, math.nan]), torch.tensor([-0.0, math.nan])
    assert (bits(zeros) != bits(numbers)).tolist() == [True, False]
    assert torch.equal(bits(numbers.bfloat16()), bits(numbers.bfloat16()))

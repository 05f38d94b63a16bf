"""The loss on held-out documents: never trained on, and the same on every layout."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evermesh.fault.events import read_events
from evermesh.parallelism import CollectiveRecord, MicroBatch, Piece
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.runtime import StepReport, TrainConfig, read_telemetry
from evermesh.runtime.data import Corpus, Sampler, hold_out, read_pieces
from evermesh.runtime.data.config import DataConfig
from evermesh.runtime.data.errors import HeldOutTooLarge, SamplerMismatch
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks
from tests.oracle import plain_attention

SIZES = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48, "initial_std": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tied_embeddings": True},
    "experts": {"moe": {"experts": 4, "ffn": 16, "shared_ffn": 16, "balancing": {"kind": "bias", "rate": 0.01}}},
}
TOKENS, STEPS = 2901, 3


def _data(corpus: Path, **changes: Any) -> dict[str, Any]:
    return {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 1700} | changes


def _config(corpus: Path, model: str = "tied", every: int = 2, tokens: int = TOKENS, **layout: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": SIZES | MODELS[model],
            "data": _data(corpus),
            "layout": layout | {"capacity": 520 // layout.get("hdp", 1)},
            "evaluation": {"every": every, "tokens": tokens},
            "checkpoint": {"every": None},
            "dtype": "float64",
            "steps": STEPS,
            "seed": 5,
        }
    )


def _fit(rank: int, workers: int, config: TrainConfig, directory: Path) -> list[CollectiveRecord]:
    records: list[CollectiveRecord] = []
    trainer = Trainer(config, directory=directory)
    with trainer.groups.listen(records.append):
        trainer.fit()
    return [record for record in records if record.phase == "evaluate"]


def _train(config: TrainConfig, directory: Path) -> tuple[list[StepReport], list[CollectiveRecord]]:
    directory.mkdir(exist_ok=True)
    records = run_ranks(config.layout.world_size, _fit, config, directory)
    return read_telemetry(directory / "telemetry.jsonl"), [record for of_rank in records for record in of_rank]


def _plain_loss(trainer: Trainer, config: TrainConfig) -> float:
    """Of every held-out sequence alone, with attention written out."""
    corpora, total, counted = trainer.corpora, 0.0, 0.0
    for batch in hold_out(corpora, config.data, TOKENS).batches:
        for sequence in batch.sequences:
            length = sequence.length
            arrays = read_pieces(corpora, sequence, [(0, length)])
            tokens, targets, counts = (torch.from_numpy(array) for array in arrays)
            alone = MicroBatch((Piece(0, ((0, length),), (0,)),))
            context = TokenContext(alone, (length,), (sequence.identity,), num_tokens=length, step=0, seed=5)
            with torch.no_grad():
                logits = trainer.built.model(tokens, torch.arange(length), plain_attention, context=context)
            losses: Tensor = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            total, counted = total + float((losses * counts).sum()), counted + float(counts.sum())
    assert counted == TOKENS
    return total / counted


@pytest.mark.parametrize("model", ["tied", "experts"])
def test_the_loss_of_one_worker_is_that_of_every_document_alone(model: str, odd_corpus: Path, tmp_path: Path) -> None:
    config = _config(odd_corpus, model)
    trainer = Trainer(config, directory=tmp_path)
    trainer.fit()
    reports = read_telemetry(tmp_path / "telemetry.jsonl")
    assert [report.held_out_loss is not None for report in reports] == [False, True, True]
    assert reports[-1].held_out_loss == pytest.approx(_plain_loss(trainer, config), rel=1e-12)
    events = [event for event in read_events(tmp_path / "events.jsonl") if event.kind == "evaluated"]
    assert [event.step for event in events] == [2, 3]
    assert f"on {TOKENS:,} held-out tokens" in events[0].text


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("tied", {"pp": 2, "hdp": 2}),
        ("experts", {"hdp": 2, "tp": 2, "ep": 4, "hot_experts": 1}),
        pytest.param("experts", {"hdp": 3, "activations": "recompute"}, marks=pytest.mark.parity),
        pytest.param("tied", {"pp": 2, "schedule": "zero-bubble"}, marks=pytest.mark.parity),
        pytest.param(
            "experts",
            {"pp": 2, "hdp": 2, "schedule": "interleaved-1f1b", "virtual_stages": 2},
            marks=pytest.mark.parity,
        ),
        pytest.param("experts", {"pp": 2, "hdp": 2, "tp": 2, "ep": 2, "etp": 2}, marks=pytest.mark.parity),
    ],
)
def test_the_loss_and_the_training_are_the_same_on_every_layout(
    model: str, layout: dict[str, Any], odd_corpus: Path, tmp_path: Path
) -> None:
    alone, _ = _train(_config(odd_corpus, model, every=STEPS), tmp_path / "alone")
    shared, records = _train(_config(odd_corpus, model, every=1, **layout), tmp_path / "shared")
    assert [report.batch for report in shared] == [report.batch for report in alone]
    assert [report.loss for report in shared] == pytest.approx([report.loss for report in alone], rel=1e-9)
    assert all(report.held_out_loss is not None for report in shared)
    assert len({report.held_out_loss for report in shared}) == STEPS
    assert shared[-1].held_out_loss == pytest.approx(alone[-1].held_out_loss, rel=1e-9)
    sites = {record.call_site for record in records}
    forward = "pipeline forward" if "pp" in layout else "expert forward" if "ep" in layout else "ring forward"
    assert sites >= {"plan", "loss weights", "scalars", forward}
    assert "bookkeeping" not in sites
    assert not {site for site in sites if "backward" in site or "gradient" in site}


def test_held_out_documents_are_never_drawn_and_make_up_the_tokens_asked_for(corpus: Path) -> None:
    config, opened = DataConfig.model_validate(_data(corpus)), Corpus.open(corpus)
    held_out = hold_out([opened], config, TOKENS)
    documents = set(held_out.documents[0].tolist())
    assert sum(batch.num_tokens for batch in held_out.batches) == TOKENS
    assert all(batch.num_tokens <= config.batch_tokens for batch in held_out.batches)
    evaluated = [sequence for batch in held_out.batches for sequence in batch.sequences]
    assert {sequence.document for sequence in evaluated} == documents
    assert all(a.stop == b.start for a, b in pairwise(evaluated) if a.document == b.document)
    sampler = Sampler([opened], config, 3, held_out.documents)
    drawn = [sequence for _ in range(60) for sequence in sampler.next_batch().sequences]
    assert sum(sequence.length for sequence in drawn) > 2 * opened.num_tokens
    assert {sequence.document for sequence in drawn} == set(range(len(opened))) - documents


def test_more_tokens_hold_out_the_same_documents_and_others(corpus: Path) -> None:
    config, opened = DataConfig.model_validate(_data(corpus)), Corpus.open(corpus)
    few, many = (hold_out([opened], config, tokens).documents[0].tolist() for tokens in (TOKENS, 2 * TOKENS))
    assert few == many[: len(few)]
    assert len(many) > len(few)


def test_a_mixture_holds_out_by_weight_and_from_a_corpus_given_twice_the_same(corpus: Path, odd_corpus: Path) -> None:
    sources = [
        {"kind": "corpus", "path": str(path), "weight": w} for path, w in ((corpus, 1), (corpus, 3), (odd_corpus, 2))
    ]
    config = DataConfig.model_validate(_data(corpus, sources=sources))
    corpora = [Corpus.open(corpus), Corpus.open(corpus), Corpus.open(odd_corpus)]
    held_out = hold_out(corpora, config, 600)
    assert held_out.documents[0].tolist() == held_out.documents[1].tolist()
    sequences = [sequence for batch in held_out.batches for sequence in batch.sequences]
    tokens = [sum(s.length for s in sequences if s.source == source) for source in range(3)]
    assert tokens == [100, 300, 200]


def test_holding_everything_out_is_refused(corpus: Path) -> None:
    config, opened = DataConfig.model_validate(_data(corpus)), Corpus.open(corpus)
    with pytest.raises(HeldOutTooLarge, match=rf"asks for {opened.num_tokens:,} tokens of .*none would be left"):
        hold_out([opened], config, opened.num_tokens)


def test_a_run_does_not_go_on_with_other_documents_held_out(corpus: Path, tmp_path: Path) -> None:
    Trainer(_config(corpus), directory=tmp_path).fit()
    with pytest.raises(SamplerMismatch, match="held_out"):
        Trainer(_config(corpus, tokens=2 * TOKENS), directory=tmp_path, resume=True)

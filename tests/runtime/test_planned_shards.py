"""Who would hold what of a run that was not started, against the run."""

from pathlib import Path
from typing import Any

import pytest

from evermesh.checkpoint import ShardMap
from evermesh.runtime import TrainConfig
from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.planned_shards import planned_shard_map
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks

MODEL = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48, "tied_embeddings": True}
LAYOUT = {"pp": 2, "hdp": 2, "sharding": {"parameters": "all", "gradients": "all"}, "capacity": 260}


def _config(corpus: Path, layout: dict[str, Any]) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": MODEL,
            "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 1700},
            "layout": layout,
            "steps": 1,
        }
    )


def _shards(rank: int, ranks: int, config: TrainConfig) -> bytes:
    return Trainer(config).shards.to_json()


def test_the_map_of_a_configuration_is_that_of_its_trainer(odd_corpus: Path) -> None:
    config = _config(odd_corpus, LAYOUT)
    maps = run_ranks(config.layout.world_size, _shards, config)
    vocabulary, _ = ShardMap.from_json(maps[0]).tensors["parameter.embedding.weight"].shape
    assert all(of_rank == maps[0] for of_rank in maps)
    assert planned_shard_map(config, vocabulary).to_json() == maps[0]


def test_what_another_library_decides_is_not_guessed(odd_corpus: Path) -> None:
    with pytest.raises(UnsupportedModel, match="Plan without it"):
        planned_shard_map(_config(odd_corpus, {"hdp": 2, "sharding": {"kind": "deepspeed"}, "capacity": 520}), 61)

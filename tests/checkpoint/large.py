"""Training states of thousands of ranks as shard maps: shapes only, no tensors."""

from collections.abc import Iterator

import torch

from evermesh.checkpoint.shard_map import ShardMap, TensorShards
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.tensor import Cut
from evermesh.parallelism.tiers import Division
from evermesh.runtime.deepspeed_engine.partitions import shard_map as deepspeed_map
from evermesh.runtime.flat import FlatLayout, HeldSet
from evermesh.runtime.optimizer import shard_map
from evermesh.runtime.own_model.state import rule

HIDDEN, KV, FFN, VOCABULARY = 16384, 1024, 53248, 128256
"""Of Llama 3 405B (arXiv 2407.21783, table 3)."""


def cuts(layers: int, tp: int) -> dict[str, Cut]:
    """The parameters of a decoder and how ranks of a tensor-parallel group cut them."""
    found = {"embedding.weight": Cut((VOCABULARY, HIDDEN), 0, tp), "norm.weight": Cut((HIDDEN,), None, tp)}
    for layer in range(layers):
        found |= {f"blocks.{layer}.{name}": cut for name, cut in _of_block(tp)}
    return found


def _of_block(tp: int) -> Iterator[tuple[str, Cut]]:
    for name, rows in (("query", HIDDEN), ("key", KV), ("value", KV)):
        yield f"attention.{name}.weight", Cut((rows, HIDDEN), 0, tp)
    yield "attention.output.weight", Cut((HIDDEN, HIDDEN), 1, tp)
    yield "ffn.up.weight", Cut((FFN, HIDDEN), 0, tp)
    yield "ffn.gate.weight", Cut((FFN, HIDDEN), 0, tp)
    yield "ffn.down.weight", Cut((HIDDEN, FFN), 1, tp)
    yield "attention_norm.weight", Cut((HIDDEN,), None, tp)
    yield "ffn_norm.weight", Cut((HIDDEN,), None, tp)


def own_map(layers: int, pp: int, hdp: int, tp: int, states: int | None = None) -> ShardMap:
    """Of our own engine: boxes over tp, cut flat over hdp, or over groups of ``states`` ranks of it."""
    mesh, names = Mesh(hdp=hdp, tp=tp, pp=pp), cuts(layers, tp)
    stages: list[dict[str, Cut]] = [{} for _ in range(pp)]
    for name, cut in names.items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        stages[layer * pp // layers][name] = cut
    division = Division(hdp, 1, 1, states or hdp)
    held = [HeldSet(FlatLayout(of_stage, division), mesh.holders(at)) for at, of_stage in enumerate(stages)]
    return shard_map(held, torch.bfloat16)


def transformers_map(layers: int, hdp: int, tp: int) -> ShardMap:
    """Of a model of transformers and AdamW: boxes over tp, and of these rows over hdp."""
    kinds = ("parameter", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    rules = {name: (cut.shape, rule(cut, hdp, tp)) for name, cut in cuts(layers, tp).items()}
    return ShardMap(
        {f"{kind}.{name}": TensorShards("float32", *entry) for kind in kinds for name, entry in rules.items()}
    )


def zero3_map(layers: int, ranks: int) -> ShardMap:
    """Of DeepSpeed with stage 3."""
    return deepspeed_map({name: cut.shape for name, cut in cuts(layers, 1).items()}, 3, ranks)

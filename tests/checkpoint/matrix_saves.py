"""Our dense model and our mixture of experts as every library saves them, and as layouts of ours hold them."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from evermesh.checkpoint import ShardMap, TensorShards, save
from evermesh.parallelism import MicroBatch, Piece
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.runtime import TrainConfig
from evermesh.runtime.model.building import held_sets
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.stages import nominal_costs, stage_parts
from evermesh.runtime.optimizer import shard_map
from tests.checkpoint.foreign_saves import OPTIMIZERS, import_deepspeed, live_state
from tests.checkpoint.states import local_storage
from tests.oracle import plain_attention

VOCABULARY = 61
SIZES = {"hidden": 24, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 44, "initial_std": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"tied_embeddings": True},
    "experts": {"moe": {"experts": 4, "ffn": 10, "shared_ffn": 6, "router": "sigmoid"}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "hdp 3": {"hdp": 3},
    "hdp 5": {"hdp": 5},
    "pp 2 hdp 2": {"pp": 2, "hdp": 2, "split": [1, 3]},
    "interleaved pp 2 tp 2": {"pp": 2, "tp": 2, "schedule": "interleaved-1f1b", "virtual_stages": 2},
    "pp 2 hdp 2 tp 2": {"pp": 2, "hdp": 2, "tp": 2, "split": [2, 2]},
    "hdp 4 divided": {"hdp": 4, "sharding": {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}},
    "hdp 2 tp 2 ep 4": {"hdp": 2, "tp": 2, "ep": 4},
    "pp 2 hdp 2 tp 2 ep 2 etp 2": {"pp": 2, "hdp": 2, "tp": 2, "ep": 2, "etp": 2, "split": [2, 2]},
    "hdp 4 ep 2 divided": {
        "hdp": 4,
        "ep": 2,
        "sharding": {"parameters": "all", "gradients": "all", "keep_for": "step"},
    },
}
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
ONE_NORM = "blocks.1.attention_norm.weight"


class Save(NamedTuple):
    """One checkpoint of a model by a library on some ranks."""

    library: str
    """``zero1`` to ``zero3``, ``torch``, ``safetensors``, or a layout of ours."""
    model: str
    ranks: int
    optimizer: str = "adamw"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join((self.library.replace(" ", "_"), self.model, str(self.ranks), self.optimizer, self.dtype))


def config(model: str, layout: str) -> TrainConfig:
    """What a job of ours would be given."""
    degrees = LAYOUTS[layout]
    return TrainConfig.model_validate(
        {
            "model": SIZES | MODELS[model],
            "data": {"sources": [{"kind": "corpus", "path": "nowhere"}], "context": 60, "batch_tokens": 240},
            "layout": degrees | {"capacity": 60},
            "checkpoint": {"every": None},
        }
    )


@functools.cache
def shards(model: str, layout: str) -> ShardMap:
    """Which rank holds what of the weights and moments of a model: what a trainer of this layout registers."""
    values = config(model, layout)
    parts = stage_parts(values.model, values.layout, nominal_costs(values.model, VOCABULARY))
    held = [of for pp in range(values.layout.pp) for of in held_sets(values, VOCABULARY, parts, pp)]
    return shard_map(held, torch.float32)


def like(whole: dict[str, Tensor], model: str, layout: str) -> ShardMap:
    """The same for the tensors of ``whole``, whatever states the optimizer has of each weight."""
    found = shards(model, layout).tensors
    return ShardMap(
        {
            name: TensorShards(
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
                found[f"parameter.{name.partition('.')[2]}"].shards,
            )
            for name, tensor in whole.items()
        }
    )


def made_up(model: str) -> dict[str, Tensor]:
    """Weights and moments of a model, the same in every process."""
    generator = torch.Generator().manual_seed(len(model))
    shapes = {name: tensor.shape for name, tensor in shards(model, "alone").tensors.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}


def save_ours(rank: int, ranks: int, folder: str, cases: Iterable[Save]) -> None:
    """Save made-up states as jobs of ours do, one after the other."""
    for case in cases:
        whole, layout = made_up(case.model), shards(case.model, case.library)
        of_rank = layout.of_rank(rank)
        held = {
            name: [local_storage(region, layout.tensors[name].form, whole[name]) for region in regions]
            for name, regions in of_rank.items()
        }
        save(Path(folder) / case.name, 3, layout, held, {}, communicator=Communicator(dist.group.WORLD))


def save_torch(rank: int, ranks: int, folder: str, cases: Iterable[Save]) -> None:
    """Save made-up states as DTensors, in the two forms of torch."""
    mesh = init_device_mesh("cpu", (ranks,))
    for case in cases:
        cut = {
            name: distribute_tensor(tensor, mesh, [Shard(index % tensor.dim())])
            for index, (name, tensor) in enumerate(made_up(case.model).items())
        }
        path = str(Path(folder) / case.name)
        if case.library == "torch":
            save_distributed(cut, checkpoint_id=path)
        else:
            save_distributed(cut, storage_writer=HuggingFaceStorageWriter(path, save_distributed=True))


class Trained(Decoder):
    """Our decoder as a module that gives its loss, as DeepSpeed wants it."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        length = len(tokens)
        alone = MicroBatch((Piece(0, ((0, length),), (0,)),))
        context = TokenContext(alone, (length,), ("a document",), num_tokens=length, step=1, seed=1)
        logits = super().forward(tokens, torch.arange(length), plain_attention, context=context)
        assert isinstance(logits, Tensor)
        return logits.float().logsumexp(-1).square().mean() + logits.float().square().mean()


def save_zero(rank: int, ranks: int, folder: str, cases: Iterable[Save]) -> None:
    """Train two steps with DeepSpeed and save; beside it ``live.pt``: what the optimizer held, and the frozen weight."""
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed = import_deepspeed(rank)
    for case in cases:
        stage, directory = int(case.library[-1]), Path(folder) / case.name
        make, settings, kinds = OPTIMIZERS[case.optimizer]
        model: nn.Module = Trained(config(case.model, "alone").model, VOCABULARY)
        model.initialize(seed=3)  # type: ignore[operator]
        model = model.to(getattr(torch, case.dtype))
        frozen = model.get_parameter(ONE_NORM).requires_grad_(False).detach().clone()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        values = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": case.dtype == "bfloat16"},
        }
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=make(groups, **settings), config=values, dist_init_required=False
        )
        generator = torch.Generator().manual_seed(rank)
        for _ in range(2):
            engine.backward(engine(torch.randint(VOCABULARY, (20,), generator=generator)))
            engine.step()
        engine.save_checkpoint(str(directory))
        live = live_state(engine, kinds, stage)
        if rank == 0:
            torch.save(live | {f"parameter.{ONE_NORM}": frozen}, directory / "live.pt")

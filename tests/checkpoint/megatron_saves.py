"""A save of Megatron Core's own ``dist_checkpointing`` on CPUs: four ranks, two of tensor and two of data parallelism.

python -m tests.checkpoint.megatron_saves FOLDER makes the files in ``data/megatron-VERSION``.
"""

import importlib
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests.cluster import run_ranks

RANKS, TENSOR = 4, 2


def whole() -> dict[str, Tensor]:
    """What is saved, by key."""
    values = torch.arange(7000.0)
    return {
        "model.rows": values[:48].view(8, 6),
        "model.columns": values[100:148].view(8, 6),
        "model.norm": values[200:206],
        "model.experts": values[300:348].view(2, 8, 3),
        "model.glu": values[400:448].view(8, 6),
        "model.half": values[500:507].to(torch.bfloat16),
    }


def flattened() -> dict[str, Tensor]:
    """What the distributed optimizer of versions before 0.14 saves besides."""
    values = torch.arange(7000.0) + 0.5
    return {
        "optimizer.rows": values[:48].view(8, 6),
        "optimizer.columns": values[100:148].view(8, 6),
        "optimizer.norm": values[200:206],
    }


def _prepare() -> tuple[Any, Any]:
    """The library, where there is no GPU: its writer waits for one by name, and is a child process."""
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    np.product = np.prod  # type: ignore[attr-defined]  # 0.13 calls it as numpy 1 did
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return (importlib.import_module(f"megatron.core.{name}") for name in ("dist_checkpointing", "package_info"))  # type: ignore[return-value]


def save_megatron(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Save in ``folder/iter_0000005``, and return what the library itself reads, whole."""
    library, info = _prepare()
    path = Path(folder) / "iter_0000005"
    if rank == 0:
        path.mkdir(parents=True)
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text("5")
    dist.barrier()
    state = _state(library, rank)
    if info.__version__.startswith("0.13"):
        state["optimizer"] = dict(_flat(library, rank))
    strategy = importlib.import_module("megatron.core.dist_checkpointing.strategies.torch")
    library.save(state, str(path), strategy.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1))
    loaded: dict[str, Any] = library.load_plain_tensors(str(path))
    return loaded


def _state(library: Any, rank: int) -> dict[str, Any]:
    tensor, replica = rank % TENSOR, rank // TENSOR
    values = whole()
    shard = library.ShardedTensor.from_rank_offsets
    mapping = importlib.import_module("megatron.core.dist_checkpointing.mapping")

    def build(key: str, local: Tensor, replica_id: Any, _: Any) -> list[Any]:
        """Gate and up projections lie one after the other in the whole, and alternate on the ranks."""
        return [
            shard(key, half.contiguous(), (0, index * TENSOR + tensor, 2 * TENSOR), replica_id=replica_id)
            for index, half in enumerate(local.chunk(2))
        ]

    glu = torch.cat([half.chunk(TENSOR)[tensor] for half in values["model.glu"].chunk(2)])
    return {
        "model": {
            "rows": shard(
                "model.rows", values["model.rows"].chunk(TENSOR)[tensor], (0, tensor, TENSOR), replica_id=replica
            ),
            "columns": shard(
                "model.columns",
                values["model.columns"].chunk(TENSOR, 1)[tensor].contiguous(),
                (1, tensor, TENSOR),
                replica_id=replica,
            ),
            "norm": shard("model.norm", values["model.norm"].clone(), replica_id=(tensor, replica)),
            "half": shard("model.half", values["model.half"].clone(), replica_id=(tensor, replica)),
            "experts": shard(
                "model.experts",
                values["model.experts"][tensor].clone(),
                (0, tensor, 2),
                prepend_axis_num=1,
                replica_id=replica,
            ),
            "glu": mapping.ShardedTensorFactory("model.glu", glu, build, torch.cat, replica),
            "extra": library.ShardedObject("model.extra", {"rank": tensor}, (TENSOR,), (tensor,), replica_id=replica),
            "none": library.LocalNonpersistentObject(rank),
        },
        "iteration": 5,
        "args": {"tensor_model_parallel_size": TENSOR},
        "checkpoint_version": 3.0,
    }


def _flat(library: Any, rank: int) -> Any:
    """Each box of tensor parallelism, flattened and cut in two at an odd place."""
    tensor, data = rank % TENSOR, rank // TENSOR
    for key, value in flattened().items():
        axis = {"optimizer.rows": 0, "optimizer.columns": 1}.get(key)
        box = value if axis is None else value.chunk(TENSOR, axis)[tensor].contiguous()
        offsets = () if axis is None else ((axis, tensor, TENSOR),)
        middle = box.numel() // 2 + 1
        part = slice(0, middle) if data == 0 else slice(middle, box.numel())
        replica = 0 if axis is not None else tensor
        yield (
            key,
            library.ShardedTensor.from_rank_offsets_flat(
                key, box.flatten()[part].clone(), tuple(box.shape), *offsets, flattened_range=part, replica_id=replica
            ),
        )


if __name__ == "__main__":
    run_ranks(RANKS, save_megatron, sys.argv[1])

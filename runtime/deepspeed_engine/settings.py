"""What DeepSpeed is told."""

from typing import Any

from evermesh.parallelism.sharding import DeepSpeed
from evermesh.runtime.config import TrainConfig


def library_config(config: TrainConfig, sharding: DeepSpeed, num_parameters: int) -> dict[str, Any]:
    """The library's own configuration; ``num_parameters`` bounds its buffers.

    Micro-batches are ours: it is told of one per step, and when the last one comes. Rates, clipping and the guard are
    ours too, so it has neither a schedule nor a limit.
    """
    pinned = {"device": "cpu", "pin_memory": config.device.kind == "cuda"}
    zero: dict[str, Any] = {
        "stage": sharding.stage,
        "reduce_bucket_size": min(sharding.bucket, num_parameters),
        "stage3_param_persistence_threshold": sharding.whole_below,
    }
    if sharding.offload != "none":
        zero["offload_optimizer"] = pinned
    if sharding.offload == "parameters":
        zero["offload_param"] = pinned
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.dtype == "bfloat16"},
    }

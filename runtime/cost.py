"""Coefficients for the planner when nobody has measured them; imports no torch."""

from evermesh.parallelism.cost import CostModel, ModelShape
from evermesh.runtime.config import TrainConfig

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


def nominal_cost(config: TrainConfig, shape: ModelShape) -> CostModel:
    """Coefficients from the sizes of the model and nominal rates of the device; set ``train.cost`` to measured ones."""
    recompute = config.layout.recompute == "block"
    if config.device.kind == "cuda":
        return CostModel.from_model(
            shape, flops_per_s=400e12, attention_flops_per_s=300e12, bytes_per_s=25e9, recompute=recompute
        )
    threads = config.device.threads
    compute = CostModel.from_model(
        shape,
        flops_per_s=50e9 * threads,
        attention_flops_per_s=40e9 * threads,
        bytes_per_s=1e9,
        bytes_per_element=_BYTES[config.dtype],
        recompute=recompute,
    )
    per_layer = {"micro_batch_s": 1e-3, "piece_s": 1e-4, "ring_step_s": 2e-4}
    return compute.model_copy(update={name: seconds * shape.layers for name, seconds in per_layer.items()})

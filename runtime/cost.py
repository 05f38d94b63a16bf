"""Coefficients for the planner when nobody has measured them; imports no torch."""

from collections.abc import Sequence

from evermesh.parallelism.cost import CostModel, ModelShape
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.pool import Pool
from evermesh.runtime.config import TrainConfig

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
"""Of parameters and activations, by ``TrainConfig.dtype``."""


def nominal_cost(config: TrainConfig, shape: ModelShape) -> CostModel:
    """Coefficients of one HDP rank from the sizes of the model and nominal rates of the device.

    The ``layout.tp`` devices of an HDP rank share its work and its ring traffic; what they send to each other is not
    counted. Set ``train.cost`` to measured coefficients.
    """
    threads = None if config.device.kind == "cuda" else config.device.threads
    return cost_of_shape(shape, config.layout, threads, ELEMENT_BYTES[config.dtype])


def cost_of_shape(shape: ModelShape, layout: Layout, threads: int | None, bytes_per_element: int) -> CostModel:
    """As ``nominal_cost``; on a CPU with so many ``threads`` per device, on a GPU where they are None."""
    recompute, recompute_products = _recomputed(layout, shape.layers)
    devices = layout.tp
    if threads is None:
        return CostModel.from_model(
            shape,
            flops_per_s=400e12 * devices,
            attention_flops_per_s=300e12 * devices,
            bytes_per_s=300e9 * devices,
            network_bytes_per_s=25e9 * devices,
            recompute=recompute,
            recompute_products=recompute_products,
        )
    compute = CostModel.from_model(
        shape,
        flops_per_s=55e9 * threads * devices,
        attention_flops_per_s=55e9 * threads * devices,
        bytes_per_s=1e9 * devices,
        bytes_per_element=bytes_per_element,
        recompute=recompute,
        recompute_products=recompute_products,
    )
    # measured on 2 cores with gloo over loopback; a ring step is three messages and two kernels
    per_layer = {"micro_batch_s": 1.1e-3, "piece_s": 2e-5, "ring_step_s": 3.5e-3}
    return compute.model_copy(update={name: seconds * shape.layers for name, seconds in per_layer.items()})


def pool_of(nodes: Sequence[int], layout: Layout, cost: CostModel) -> Pool:
    """The HDP ranks of a layout, for the planner; ``nodes`` holds the node of every rank.

    Nodes count only where ``cost`` says that networks are slower, so that without it plans are the same on any machines.
    """
    mesh = Mesh.of(layout)
    of_hdp = [nodes[mesh.rank(hdp)] for hdp in range(layout.hdp)]
    differ = cost.network_token_s is not None or cost.network_step_s is not None
    if not differ or of_hdp != sorted(of_hdp):
        return Pool.of(layout.hdp)
    return Pool(tuple(of_hdp), (1.0,) * layout.hdp)


def _recomputed(layout: Layout, layers: int) -> tuple[float, float]:
    """The share of all blocks whose attention is computed again, and the share of products."""
    policies = [layout.activations_of(layer) for layer in range(layers)]
    whole, offloads = (policies.count(policy) / layers for policy in ("recompute", "offload"))
    return whole, whole + offloads * (1.0 - layout.offload)

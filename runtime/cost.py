"""Coefficients for the planner when nobody has measured them; imports no torch."""

from collections.abc import Sequence

from evermesh.parallelism.cost import CostModel, ModelShape
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.layout.activations import Precision
from evermesh.parallelism.layout.device import DEVICES
from evermesh.parallelism.layout.offloading import repeated
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
    repeats = sum(layout.activations_of(layer) == "recompute" for layer in range(shape.layers)) / shape.layers
    devices = layout.tp
    if threads is None:
        cost = CostModel.from_model(
            shape,
            flops_per_s=400e12 * devices,
            attention_flops_per_s=300e12 * devices,
            bytes_per_s=300e9 * devices,
            network_bytes_per_s=25e9 * devices,
            recompute=repeats,
        )
        return _with_offloading(cost, shape, layout, bytes_per_element, None)
    cost = CostModel.from_model(
        shape,
        flops_per_s=55e9 * threads * devices,
        attention_flops_per_s=55e9 * threads * devices,
        bytes_per_s=1e9 * devices,
        bytes_per_element=bytes_per_element,
        recompute=repeats,
    )
    cost = _with_offloading(cost, shape, layout, bytes_per_element, threads)
    # measured on 2 cores with gloo over loopback; a ring step is three messages and two kernels
    per_layer = {"micro_batch_s": 1.1e-3, "piece_s": 2e-5, "ring_step_s": 3.5e-3}
    return cost.model_copy(update={name: seconds * shape.layers for name, seconds in per_layer.items()})


def _with_offloading(
    cost: CostModel, shape: ModelShape, layout: Layout, bytes_per_element: int, threads: int | None
) -> CostModel:
    """With what blocks that offload compute again, save and copy."""
    if "offload" not in layout.activation_policies:
        return cost
    again = repeated(shape, layout, Precision(bytes_per_element))
    # forward seconds per element of a matrix that a token passes through
    element_s = cost.token_s / 3.0 / (shape.linear_flops_per_token() / 2.0)
    recompute_s, saved_s = element_s * again.elements, element_s * again.saved
    device = DEVICES["h100" if threads is None else "cpu"]
    always_s, products_s = (
        moved / (device.host_bytes_per_s * (threads or 1)) for moved in (again.host_bytes, again.products_bytes)
    )
    if threads is None:
        copies = {"host_token_s": always_s, "host_products_token_s": products_s}
    else:  # the cores that compute make the copies, out and back: they are more work and hide behind nothing
        recompute_s, saved_s, copies = recompute_s + 2 * always_s, max(0.0, saved_s - 2 * products_s), {}
    return cost.model_copy(
        update={"recompute_token_s": recompute_s, "offload_saves_token_s": saved_s, **copies},
    )


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

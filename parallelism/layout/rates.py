"""Seconds per token, pair and micro-batch of one HDP rank of a layout, by what they are spent on; imports no torch.

As in ``CostModel``, an HDP rank is the ``tp`` devices of every stage of a pipeline, one stage after the other.
"""

import functools
from typing import NamedTuple

from evermesh.parallelism.cost import CostModel, ModelShape
from evermesh.parallelism.layout.activations import Precision, block_tokens
from evermesh.parallelism.layout.degrees import ActivationPolicy, Layout
from evermesh.parallelism.layout.device import Device
from evermesh.parallelism.layout.network import Network


class Rates(NamedTuple):
    """Forward and backward together."""

    products: float
    """Matrix products, per token."""
    recompute: float
    """What is computed again, per token, pairs apart."""
    tensor: float
    """Gathers and scatters of the ranks that share a model, per token."""
    experts: float
    """The way of tokens to their experts and back, per token."""
    offload: float
    """Moving activations to host memory and back, as far as no computation hides it, per token."""
    pair: float
    """Attention, per visible pair."""
    recompute_pair: float
    layer: float
    """Fixed, per micro-batch, all layers."""
    ring_token: float
    network_token: float
    head_token: float

    @property
    def token(self) -> float:
        """All that a token costs."""
        return self.products + self.recompute + self.tensor + self.experts + self.offload

    def cost_model(self) -> CostModel:
        """For the planner. What recomputation costs is in it already, because layouts found here recompute always."""
        return CostModel(
            token_s=self.products + self.recompute + self.tensor + self.offload,
            pair_s=self.pair + self.recompute_pair,
            micro_batch_s=self.layer,
            expert_token_s=self.experts,
            ring_token_s=self.ring_token,
            network_token_s=self.network_token,
            head_token_s=self.head_token,
        )


class Hardware(NamedTuple):
    """What a layout runs on."""

    network: Network
    device: Device
    precision: Precision
    imbalance: float = 1.0
    """The most rows that the experts of a rank get, over the mean."""


def rates(shape: ModelShape, layout: Layout, hardware: Hardware) -> Rates:
    """Of one HDP rank whose devices have speed 1."""
    network, device, precision = hardware.network, hardware.device, hardware.precision
    whole = _share(shape, layout, "recompute")
    flops = CostModel.from_model(
        shape,
        flops_per_s=device.flops_per_s * layout.tp,
        attention_flops_per_s=device.attention_flops_per_s * layout.tp,
        bytes_per_s=network.intra_bytes_per_s * layout.tp,
        network_bytes_per_s=network.device_bytes_per_s(layout.stage_size) * layout.tp,
        bytes_per_element=precision.element_bytes,
        recompute=whole,
        recompute_products=0.0,
    )
    again = _recomputed_elements(shape, layout)
    experts, experts_again = _experts(shape, layout, hardware)
    tensor = _tensor(shape, layout, hardware, whole)
    return Rates(
        products=flops.token_s,
        recompute=2.0 * again / (device.flops_per_s * layout.tp) + experts_again,
        tensor=tensor.per_token,
        experts=experts,
        offload=_offload(shape, layout, hardware),
        pair=flops.pair_s,
        recompute_pair=flops.recompute_pair_s,
        layer=device.layer_s * (shape.layers + again / sum(_elements(shape)) * shape.layers / 3.0) + tensor.fixed,
        ring_token=flops.ring_token_s,
        network_token=flops.network_token_s or flops.ring_token_s,
        head_token=flops.head_token_s,
    )


def _share(shape: ModelShape, layout: Layout, policy: ActivationPolicy) -> float:
    """Of all blocks, those with this policy."""
    if isinstance(layout.activations, str):
        return float(layout.activations == policy)
    return layout.activations.count(policy) / shape.layers


@functools.lru_cache(maxsize=64)
def _elements(shape: ModelShape) -> tuple[int, ...]:
    return tuple(map(shape.active_elements, range(shape.layers)))


def _recomputed_elements(shape: ModelShape, layout: Layout) -> float:
    """Elements of the matrices that a token passes through again in the backward pass.

    A block that offloads computes projections of attention and of the feed-forward block again, of the tokens whose products
    were not moved, and a mixture whole.
    """
    elements, total = _elements(shape), 0.0
    if layout.recompute == "none":
        return total
    projections = shape.hidden * shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    inner = (shape.ffn_matrices - 1) * shape.hidden * shape.ffn
    for layer in range(shape.layers):
        policy = layout.activations_of(layer)
        if policy == "recompute":
            total += elements[layer]
        elif policy == "offload" and shape.has_experts(layer):
            total += (1.0 - layout.offload) * projections + elements[layer] - shape.attention_elements()
        elif policy == "offload":
            total += (1.0 - layout.offload) * (projections + inner)
    return total


class _Tensor(NamedTuple):
    per_token: float
    fixed: float
    """Per micro-batch."""


def _tensor(shape: ModelShape, layout: Layout, hardware: Hardware, whole: float) -> _Tensor:
    """Two gathers and two scatters in a block forward, their mirror images backward (arXiv 2205.05198, section 4.2.2)."""
    tp = layout.tp
    if tp == 1:
        return _Tensor(0.0, 0.0)
    one = (tp - 1) / tp * shape.hidden * hardware.precision.element_bytes / hardware.network.group_bytes_per_s(tp, 1)
    offloads = _share(shape, layout, "offload") * (layout.offload < 1.0)
    repeated = 2.0 * (whole + offloads) + whole  # both gathers, and where attention is repeated, its scatter
    half = (4.0 + repeated / 2.0) * shape.layers
    ends = 4.0  # embedding and head
    return _Tensor(
        per_token=one * (half + half / layout.tp_chunks + ends),
        fixed=(half + half * layout.tp_chunks + ends) * (tp - 1) * hardware.device.hop_s,
    )


def _experts(shape: ModelShape, layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Per token of an HDP rank: there and back, forward and backward; and what recomputation repeats of it."""
    experts, network = shape.experts, hardware.network
    if experts is None or layout.ep * layout.etp == 1:
        return 0.0, 0.0
    row = experts.top_k * shape.hidden * hardware.precision.element_bytes / layout.tp * hardware.imbalance
    extent = layout.ep * layout.etp
    inside = max(1, min(layout.ep, network.devices // layout.etp)) if network.crosses_nodes(extent) else layout.ep
    seconds = row * (inside - 1) / layout.ep / network.intra_bytes_per_s
    if inside < layout.ep:
        seconds += row * (layout.ep - inside) / layout.ep / network.device_bytes_per_s(extent)
    seconds += (
        row * (layout.etp - 1) / network.group_bytes_per_s(layout.etp, 1)
    )  # rows of the others, and their outputs
    again = sum(layout.activations_of(layer) != "keep" for layer in range(shape.layers) if shape.has_experts(layer))
    return 4.0 * seconds * experts.layers, 2.0 * seconds * again


def _offload(shape: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """What moving takes longer than the products of the block that it runs beside."""
    if "offload" not in layout.activation_policies:
        return 0.0
    exposed, elements = 0.0, _elements(shape)
    for layer in range(shape.layers):
        moved = block_tokens(shape, layout, layer, hardware.precision).host / hardware.device.host_bytes_per_s
        forward = 2.0 * elements[layer] / (hardware.device.flops_per_s * layout.tp)
        exposed += (max(0.0, moved - forward) + max(0.0, moved - 2.0 * forward)) if moved else 0.0
    return exposed


__all__ = ["Hardware", "Rates", "rates"]

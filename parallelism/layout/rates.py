"""Seconds per token, pair and micro-batch of one HDP rank of a layout, by what they are spent on; imports no torch.

As in ``CostModel``, an HDP rank is the ``tp`` devices of every stage of a pipeline, one stage after the other.
"""

import functools
from typing import Literal, NamedTuple

from evermesh.parallelism.cost import CostModel, ModelShape, Work
from evermesh.parallelism.layout.activations import Precision
from evermesh.parallelism.layout.degrees import ActivationPolicy, Layout
from evermesh.parallelism.layout.device import Device
from evermesh.parallelism.layout.network import Network
from evermesh.parallelism.layout.offloading import repeated


class Rates(NamedTuple):
    """Forward and backward together."""

    products: float
    """Matrix products, per token."""
    recompute: float
    """What is computed again, per token, pairs apart, where no products wait in host memory."""
    saved: float
    """Of it, what is not computed again of a token whose products do."""
    tensor: float
    """Gathers and scatters of the ranks that share a model, per token."""
    experts: float
    """The way of tokens to their experts and back, per token."""
    host: float
    """Copying what is always moved to host memory, one way, per token."""
    host_products: float
    """Copying the products of a token besides."""
    pair: float
    """Attention, per visible pair."""
    recompute_pair: float
    layer: float
    """Fixed, per micro-batch, all layers."""
    ring_token: float
    network_token: float
    head_token: float
    offload: float | Literal["auto"] = 0.0
    """As in the layout."""

    @property
    def most_saved(self) -> float:
        """What is not computed again, per token, where as much waits in host memory as may."""
        return self.saved * (1.0 if self.offload == "auto" else self.offload)

    @property
    def token(self) -> float:
        """All that a token costs at least: copies hide, and as much waits in host memory as may."""
        return self.products + self.recompute - self.most_saved + self.tensor + self.experts

    def offload_s(self, tokens: float, pairs: float) -> "Offloading":
        """Of micro-batches with so many tokens and pairs together, if these are alike; if not, it is more."""
        if self.host + self.host_products + self.saved == 0:
            return Offloading(0.0, 0.0, 0.0)
        model, work = self.cost_model(), Work(tokens, pairs)
        fraction = model.best_offload(work) if self.offload == "auto" else self.offload
        saved = fraction * self.saved * tokens
        exposed = model.offload_s(work, fraction) + saved
        return Offloading(saved, exposed, exposed - saved + self.most_saved * tokens)

    def cost_model(self) -> CostModel:
        """For the planner.

        What recomputation costs is in what tokens and pairs cost, because layouts found here recompute always; not so where
        blocks offload, whose copies hide behind the rest.
        """
        again = self.host + self.host_products + self.saved > 0
        return CostModel(
            token_s=self.products + (0.0 if again else self.recompute) + self.tensor,
            pair_s=self.pair + (0.0 if again else self.recompute_pair),
            recompute_token_s=self.recompute if again else 0.0,
            recompute_pair_s=self.recompute_pair if again else 0.0,
            offload_saves_token_s=self.saved,
            host_token_s=self.host,
            host_products_token_s=self.host_products,
            micro_batch_s=self.layer,
            expert_token_s=self.experts,
            ring_token_s=self.ring_token,
            network_token_s=self.network_token,
            head_token_s=self.head_token,
        )


class Offloading(NamedTuple):
    """Seconds."""

    saved: float
    """Not computed again, because products wait in host memory."""
    exposed: float
    """That copies last longer than what they hide behind."""
    beyond: float
    """More than ``Rates.token`` says."""


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
    again = repeated(shape, layout, precision)
    left = again.elements - layout.most_offload * again.saved
    experts, experts_again = _experts(shape, layout, hardware)
    tensor = _tensor(shape, layout, hardware, whole)
    return Rates(
        products=flops.token_s,
        recompute=2.0 * again.elements / (device.flops_per_s * layout.tp) + experts_again,
        saved=2.0 * again.saved / (device.flops_per_s * layout.tp),
        tensor=tensor.per_token,
        experts=experts,
        host=again.host_bytes / device.host_bytes_per_s,
        host_products=again.products_bytes / device.host_bytes_per_s,
        pair=flops.pair_s,
        recompute_pair=flops.recompute_pair_s,
        layer=device.layer_s * (shape.layers + left / sum(_elements(shape)) * shape.layers / 3.0) + tensor.fixed,
        ring_token=flops.ring_token_s,
        network_token=flops.network_token_s or flops.ring_token_s,
        head_token=flops.head_token_s,
        offload=layout.offload,
    )


def _share(shape: ModelShape, layout: Layout, policy: ActivationPolicy) -> float:
    """Of all blocks, those with this policy."""
    if isinstance(layout.activations, str):
        return float(layout.activations == policy)
    return layout.activations.count(policy) / shape.layers


@functools.lru_cache(maxsize=64)
def _elements(shape: ModelShape) -> tuple[int, ...]:
    return tuple(map(shape.active_elements, range(shape.layers)))


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
    offloads = _share(shape, layout, "offload") * (layout.offload != 1.0)
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


__all__ = ["Hardware", "Rates", "rates"]

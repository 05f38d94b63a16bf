"""The model of one rank: made, shared, and laid into flat buffers, in the only order that works."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from evermesh.parallelism.experts.apply import apply_expert_parallel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.pipeline.deferred import DeferredWeights
from evermesh.parallelism.pipeline.executor import PipelineExecutor
from evermesh.parallelism.pipeline.links import open_links
from evermesh.parallelism.tensor.apply import apply_tensor_parallel
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.flat import AnyCut, FlatLayout, HeldSet
from evermesh.runtime.memory.policy import ActivationMemory
from evermesh.runtime.memory.products import Products
from evermesh.runtime.micro_batch import MicroBatchRunner
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.gathering import apply_gathering, names_by_module
from evermesh.runtime.model.measuring import layer_costs
from evermesh.runtime.model.sharding import DECODER_EXPERTS, DECODER_PRODUCTS, DECODER_SHARDING
from evermesh.runtime.model.stages import Part, parts_of_rank, stage_parts
from evermesh.runtime.model.tied import TiedHead
from evermesh.runtime.parameter_set import Owners, ParameterSet, Reductions, Sharers, sum_gradients
from evermesh.runtime.process_group import Groups


class BuiltModel(NamedTuple):
    """What one rank trains, and what all ranks hold."""

    model: Decoder
    stages: tuple[Part, ...]
    """The part of every pipeline stage."""
    parts: Mapping[int, Part]
    """Those of this rank, by stage."""
    sets: list[ParameterSet]
    """This rank's parameters."""
    held: list[list[HeldSet]]
    """Those of all ranks, by pipeline rank."""
    tied: TiedHead | None
    """The copy of an embedding that another stage holds, or that embedding; None: there is no such copy."""
    deferred: DeferredWeights | None
    """Where linear layers leave what a schedule without bubbles computes later."""
    memory: ActivationMemory
    """What becomes of activations."""
    gathers_for_step: bool
    """Whether parameters that ranks divide are gathered for the length of a step; else a block at a time."""

    def begin_step(self) -> None:
        """Forget the gradients of the last step, and begin to gather the parameters of this one. Collective."""
        for parameters in self.sets:
            parameters.begin_step()
        if self.tied is not None:
            self.tied.begin_step()
        self.begin_forward()

    def begin_forward(self) -> None:
        """Begin to gather what stays until ``end_step``, in the order in which it is needed. Collective."""
        for parameters in self.sets if self.gathers_for_step else ():
            parameters.start_gather()

    def end_step(self) -> None:
        """Give memory back that is needed only while a batch is trained or evaluated."""
        for parameters in self.sets:
            parameters.end_step()

    @contextmanager
    def gathered_experts(self, layers: Iterable[int]) -> Iterator[None]:
        """The experts of these layers are there until the block ends. Collective over those that divide them."""
        found = self._experts(layers)
        for parameters in found:
            parameters.gather()
        yield
        for parameters in found if not self.gathers_for_step else ():
            parameters.free()

    def reduce_experts(self, layers: Iterable[int]) -> None:
        """Take note of gradients that others have added to those of the experts of these layers. Collective likewise."""
        for parameters in self._experts(layers):
            if not parameters.keeps_gradients:
                parameters.reduce()

    def _experts(self, layers: Iterable[int]) -> list[ParameterSet]:
        prefixes = tuple(f"blocks.{layer}.mixture.experts." for layer in layers)
        return [of for of in self.sets if any(name.startswith(prefixes) for name in of.parameters)]

    def sum_gradients(self) -> torch.Tensor:
        """Sum those of all ranks; returns this rank's part of the square of their norm, a float64 scalar. Collective."""
        if self.tied is not None:
            self.tied.sum_gradients()
        return sum_gradients(self.sets)


def build_runner(built: BuiltModel, layout: Layout, groups: Groups, buckets: Sequence[int] = ()) -> MicroBatchRunner:
    """What runs micro-batches through ``built``. Collective over the pipeline."""
    if layout.pipeline.num_stages == 1:
        return MicroBatchRunner(built.model, groups.hdp, groups.tp, memory=built.memory, buckets=buckets)
    open_links(groups.links, next(built.model.parameters()).device)
    pipeline = PipelineExecutor(layout.pipeline, groups.place.pp, groups.links, built.deferred)
    return MicroBatchRunner(built.model, groups.hdp, groups.tp, pipeline, built.parts, built.memory, buckets)


def build_model(
    config: TrainConfig, vocabulary: int, groups: Groups, device: torch.device, *, initialize: bool = True
) -> BuiltModel:
    """This rank's part of the model on ``device``, and its buffers. Collective, if the split is measured.

    Without ``initialize`` the weights are not those of ``config.seed``, but what somebody puts there before they are used.
    """
    layout = config.layout
    all_parts = stage_parts(config.model, layout, layer_costs(config, vocabulary, groups.world, device))
    parts = parts_of_rank(all_parts, layout, groups.place.pp)
    model = Decoder(config.model, vocabulary, list(parts.values()))
    if initialize:
        model.initialize(config.seed)  # whole, so that the values do not depend on the layout
    # before the device: only this part has to fit
    cuts = apply_tensor_parallel(model, DECODER_SHARDING, groups.tp, layout.tp_chunks)
    expert_cuts = apply_expert_parallel(model, DECODER_EXPERTS, groups.ep, groups.etp)
    deferred = DeferredWeights() if layout.pipeline.splits_backward else None
    if deferred is not None:
        deferred.apply(model)
    products = Products()
    if "offload" in layout.activation_policies:
        products.apply(model, DECODER_PRODUCTS, deferred)
    model = model.to(device, getattr(torch, config.dtype))
    tied = TiedHead.of(model, cuts, groups)  # before the sets: a copy is in none of them
    sharers = Sharers(groups.tp, groups.tp.rank)
    expert_sharers = Sharers(number=groups.ep.rank * groups.etp.size + groups.etp.rank, parts=groups.etp)
    # last: a parameter that is moved leaves its buffer
    sets = _sets(model, cuts, groups.owners, sharers, config)
    sets += _sets(model, expert_cuts, groups.expert_owners, expert_sharers, config)
    reductions = Reductions()
    for parameters in sets:
        parameters.reductions = reductions
    if tied is not None:
        tied.trained = next((of for of in sets if "embedding.weight" in of.parameters), None)
    if layout.tiers.by_block:
        apply_gathering(model, sets, parts, for_step=not layout.tiers.in_lock_step)
    held = [held_sets(config, vocabulary, all_parts, pp) for pp in range(layout.pp)]
    for_step = not layout.tiers.in_lock_step
    memory = ActivationMemory(layout, products, device)
    return BuiltModel(model, all_parts, parts, sets, held, tied, deferred, memory, for_step)


def _sets(
    model: Decoder, cuts: Mapping[str, AnyCut], owners: Owners, sharers: Sharers, config: TrainConfig
) -> list[ParameterSet]:
    """What is gathered and summed together: all of them, or those of a block."""
    layout = config.layout
    keeps_gradients = layout.keeps_gradients or owners.division.gradients == 1
    return [
        ParameterSet(
            {name: model.get_parameter(name) for name in names},
            {name: cuts[name] for name in names},
            owners,
            sharers,
            keeps_gradients=keeps_gradients,
        )
        for names in _together(cuts, layout)
    ]


def _together(cuts: Mapping[str, AnyCut], layout: Layout) -> list[list[str]]:
    if layout.tiers.by_block:
        return names_by_module(list(cuts))
    return [list(cuts)] if cuts else []


def held_sets(config: TrainConfig, vocabulary: int, parts: tuple[Part, ...], pp: int) -> list[HeldSet]:
    """The sets of the ranks of one pipeline rank; makes no tensors."""
    with torch.device("meta"):
        model = Decoder(config.model, vocabulary, list(parts_of_rank(parts, config.layout, pp).values()))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if model.copies_embedding:
        del shapes["head.weight"]
    layout, mesh = config.layout, Mesh.of(config.layout)
    sides = (
        (DECODER_SHARDING.cuts(shapes, mesh.tp), layout.division, mesh.holders(pp)),
        (DECODER_EXPERTS.cuts(shapes, mesh.ep, mesh.etp), layout.expert_division, mesh.expert_holders(pp)),
    )
    return [
        HeldSet(FlatLayout({name: cuts[name] for name in names}, division), holders)
        for cuts, division, holders in sides
        for names in _together(cuts, layout)
    ]

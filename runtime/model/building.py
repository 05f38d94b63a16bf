"""The model of one rank: made, shared, and laid into flat buffers, in the only order that works."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.apply import apply_expert_parallel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.pipeline.deferred import DeferredWeights
from evermesh.parallelism.pipeline.executor import PipelineExecutor
from evermesh.parallelism.pipeline.links import open_links
from evermesh.parallelism.tensor.apply import apply_tensor_parallel
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.flat import FlatLayout, FlatParameters, HeldSet, ParameterSet, sum_gradients
from evermesh.runtime.micro_batch import MicroBatchRunner
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.measuring import layer_costs
from evermesh.runtime.model.sharding import DECODER_EXPERTS, DECODER_SHARDING
from evermesh.runtime.model.stages import Part, parts_of_rank, stage_parts
from evermesh.runtime.model.tied import TiedHead
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
    held: list[HeldSet]
    """Those of all ranks."""
    tied: TiedHead | None
    """The copy of an embedding that another stage holds, or that embedding; None: there is no such copy."""
    deferred: DeferredWeights | None
    """Where linear layers leave what a schedule without bubbles computes later."""

    def zero_gradients(self) -> None:
        """Before a step."""
        for parameters in self.sets:
            parameters.flat.gradients.zero_()
        if self.tied is not None:
            self.tied.begin_step()

    def sum_gradients(self) -> torch.Tensor:
        """Sum those of all ranks; returns this rank's part of the square of their norm, a float64 scalar. Collective."""
        if self.tied is not None:
            self.tied.sum_gradients()
        return sum_gradients(self.sets)


def build_runner(built: BuiltModel, layout: Layout, groups: Groups) -> MicroBatchRunner:
    """What runs micro-batches through ``built``. Collective over the pipeline."""
    if layout.pipeline.num_stages == 1:
        return MicroBatchRunner(built.model, groups.hdp, groups.tp)
    open_links(groups.links, next(built.model.parameters()).device)
    pipeline = PipelineExecutor(layout.pipeline, groups.place.pp, groups.links, built.deferred)
    return MicroBatchRunner(built.model, groups.hdp, groups.tp, pipeline, built.parts)


def build_model(config: TrainConfig, vocabulary: int, groups: Groups, device: torch.device) -> BuiltModel:
    """This rank's part of the model on ``device``, and its buffers. Collective, if the split is measured."""
    layout, mesh = config.layout, Mesh.of(config.layout)
    all_parts = stage_parts(config.model, layout, layer_costs(config, vocabulary, groups.world, device))
    parts = parts_of_rank(all_parts, layout, groups.place.pp)
    model = Decoder(config.model, vocabulary, list(parts.values()))
    model.initialize(config.seed)  # whole, so that the values do not depend on the layout
    cuts = apply_tensor_parallel(model, DECODER_SHARDING, groups.tp)  # before the device: only this part has to fit
    expert_cuts = apply_expert_parallel(model, DECODER_EXPERTS, groups.ep, groups.etp)
    deferred = DeferredWeights() if layout.pipeline.splits_backward else None
    if deferred is not None:
        deferred.apply(model)
    model = model.to(device, getattr(torch, config.dtype))
    tied = TiedHead.of(model, cuts, groups)  # before the sets: a copy is in none of them
    # last: a parameter that is moved leaves its buffer
    sets = [ParameterSet(FlatParameters(model, mesh.hdp, cuts), groups.hdp, groups.tp, groups.tp.rank)]
    if expert_cuts:
        sharer = groups.ep.rank * groups.etp.size + groups.etp.rank
        flat = FlatParameters(model, mesh.edp, expert_cuts)
        sets.append(ParameterSet(flat, groups.edp, Communicator(), sharer, parts=groups.etp))
    held = [of_stage for pp in range(mesh.pp) for of_stage in _held(config, vocabulary, mesh, all_parts, pp)]
    return BuiltModel(model, all_parts, parts, sets, held, tied, deferred)


def _held(config: TrainConfig, vocabulary: int, mesh: Mesh, parts: tuple[Part, ...], pp: int) -> list[HeldSet]:
    """The sets of the ranks of one pipeline stage."""
    with torch.device("meta"):
        model = Decoder(config.model, vocabulary, list(parts_of_rank(parts, config.layout, pp).values()))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if model.copies_embedding:
        del shapes["head.weight"]
    held = [HeldSet(FlatLayout(DECODER_SHARDING.cuts(shapes, mesh.tp), mesh.hdp), mesh.holders(pp))]
    expert_cuts = DECODER_EXPERTS.cuts(shapes, mesh.ep, mesh.etp)
    if expert_cuts:
        held.append(HeldSet(FlatLayout(expert_cuts, mesh.edp), mesh.expert_holders(pp)))
    return held

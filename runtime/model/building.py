"""The model of one rank: made, shared, and laid into flat buffers, in the only order that works."""

from typing import NamedTuple

import torch

from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.tensor.apply import apply_tensor_parallel
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.flat import FlatLayout, FlatParameters, HeldSet, ParameterSet
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.sharding import DECODER_SHARDING
from evermesh.runtime.process_group import Groups


class BuiltModel(NamedTuple):
    """What one rank trains, and what all ranks hold."""

    model: Decoder
    sets: list[ParameterSet]
    """This rank's parameters."""
    held: list[HeldSet]
    """Those of all ranks."""


def build_model(config: TrainConfig, vocabulary: int, groups: Groups, device: torch.device) -> BuiltModel:
    """This rank's part of the model on ``device``, and the buffers that hold its parameters. Not collective."""
    mesh = Mesh.of(config.layout)
    model = Decoder(config.model, vocabulary)
    model.initialize(config.seed)  # whole, so that the values do not depend on the layout
    cuts = apply_tensor_parallel(model, DECODER_SHARDING, groups.tp)  # before the device: only this part has to fit
    model = model.to(device, getattr(torch, config.dtype))
    flat = FlatParameters(model, mesh.hdp, cuts)  # last: a parameter that is moved leaves its buffer
    held = [HeldSet(FlatLayout(cuts, mesh.hdp), mesh.holders(pp=0))]
    return BuiltModel(model, [ParameterSet(flat, groups.hdp, groups.tp)], held)

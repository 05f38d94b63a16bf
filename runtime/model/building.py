"""The model of one rank: made, shared, and laid into flat buffers, in the only order that works."""

import torch

from evermesh.parallelism.tensor.apply import apply_tensor_parallel
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.flat import FlatParameters
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.sharding import DECODER_SHARDING
from evermesh.runtime.process_group import Groups


def build_model(
    config: TrainConfig, vocabulary: int, groups: Groups, device: torch.device
) -> tuple[Decoder, FlatParameters]:
    """This rank's part of the model on ``device``, and the buffers that hold its parameters. Not collective."""
    model = Decoder(config.model, vocabulary)
    model.initialize(config.seed)  # whole, so that the values do not depend on the layout
    cuts = apply_tensor_parallel(model, DECODER_SHARDING, groups.tp)  # before the device: only this part has to fit
    model = model.to(device, getattr(torch, config.dtype))
    flat = FlatParameters(model, groups.hdp.size, cuts)  # last: a parameter that is moved leaves its buffer
    return model, flat

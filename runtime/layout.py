"""Which layouts the trainer can run; imports no torch, so that the launcher can ask before it starts anything."""

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.experts.sharding import check_degrees
from evermesh.parallelism.mesh import Mesh
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.errors import UnsupportedLayout
from evermesh.runtime.model.sharding import DECODER_SHARDING
from evermesh.runtime.model.stages import stage_parts


def check_layout(config: TrainConfig) -> None:
    """Return if the trainer can run the layout of ``config`` on ``layout.world_size`` workers.

    Raises:
        UnsupportedLayout: it asks for something that the trainer cannot apply.
        LayoutDoesNotFit: a degree does not divide what it shares, or there are more stages than layers.
    """
    layout, model = config.layout, config.model
    if layout.offload > 0:
        raise UnsupportedLayout(
            f"layout.offload {layout.offload}: this version keeps all activations on the device. Set it to 0."
        )
    DECODER_SHARDING.check_degree(layout.tp, model.model_dump())
    Mesh.of(layout)
    stage_parts(model, model.vocabulary or 1, layout)
    if model.moe is not None:
        check_degrees(layout.ep, layout.etp, experts=model.moe.experts, ffn=model.moe.ffn)
    elif layout.ep * layout.etp > 1:
        raise LayoutDoesNotFit(
            f"layout.ep {layout.ep} x layout.etp {layout.etp}, but the model has no experts. Set both to 1, or describe the "
            f"experts under train.model.moe.",
            axis="ep" if layout.ep > 1 else "etp",
        )

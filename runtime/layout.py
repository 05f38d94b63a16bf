"""Which layouts the trainer can run; imports no torch, so that the launcher can ask before it starts anything."""

from evermesh.runtime.config import TrainConfig
from evermesh.runtime.errors import UnsupportedLayout
from evermesh.runtime.model.sharding import DECODER_SHARDING


def check_layout(config: TrainConfig) -> None:
    """Return if the trainer can run the layout of ``config`` on ``layout.world_size`` workers.

    Raises:
        UnsupportedLayout: it asks for an axis that the trainer cannot apply.
        LayoutDoesNotFit: the tensor-parallel degree does not divide the model's sizes.
    """
    layout = config.layout
    degrees = {"pp": layout.pp, "ep": layout.ep, "etp": layout.etp}
    unsupported = [f"layout.{axis} {degree}" for axis, degree in degrees.items() if degree > 1]
    if layout.offload > 0:
        unsupported.append(f"layout.offload {layout.offload}")
    if unsupported:
        raise UnsupportedLayout(
            f"{', '.join(unsupported)}: this version runs hybrid data and context parallelism (hdp) and tensor parallelism "
            f"(tp) only. Leave them out and share the workers between layout.hdp and layout.tp."
        )
    DECODER_SHARDING.check_degree(layout.tp, config.model.model_dump())

"""What can be trained with DeepSpeed; imports neither torch nor the library."""

import importlib.util
from typing import TYPE_CHECKING

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout import Layout
from evermesh.runtime.errors import EngineMissing

if TYPE_CHECKING:
    from evermesh.runtime.config import TrainConfig


def check_degrees(layout: Layout) -> None:
    """Return if DeepSpeed can shard over the ranks of ``layout``, or is not asked to.

    Raises:
        LayoutDoesNotFit: there are ranks that share a model.
    """
    degrees = {axis: getattr(layout, axis) for axis in ("pp", "tp", "ep", "etp")}
    shared = [axis for axis, degree in degrees.items() if degree > 1]
    if layout.deepspeed is not None and shared:
        is_now = " x ".join(f"{axis} {degrees[axis]}" for axis in shared)
        raise LayoutDoesNotFit(
            f"layout.sharding is deepspeed, which shards over HDP ranks only, but ranks share the model: {is_now}. Set "
            f"{' and '.join(f'layout.{axis}' for axis in shared)} to 1, or leave layout.sharding out.",
            axis=shared[0],
        )


def check_config(config: "TrainConfig") -> None:
    """Return if DeepSpeed can train ``config``, or is not asked to.

    Raises:
        LayoutDoesNotFit: it cannot, with this type of parameters or this optimizer.
    """
    if config.layout.deepspeed is None:
        return
    if config.dtype == "float64":
        raise LayoutDoesNotFit(
            "layout.sharding is deepspeed, which keeps parameters in float32 or bfloat16, but dtype is float64. Set dtype to "
            "float32, or leave layout.sharding out.",
            axis="sharding",
        )
    if "offload" in config.layout.activation_policies or config.compile is not None:
        is_set = "train.compile is set" if config.compile is not None else "layout.activations says offload"
        raise LayoutDoesNotFit(
            f"layout.sharding is deepspeed, whose hooks need the modules as they are, but {is_set}. Leave that out, or "
            "layout.sharding.",
            axis="sharding",
        )
    if config.optimizer.kind != "adamw":
        raise LayoutDoesNotFit(
            f"optimizer.kind is {config.optimizer.kind}, which needs the norms of whole layers, but layout.sharding is "
            "deepspeed, whose ranks see only their parts. Set optimizer.kind to adamw, or leave layout.sharding out.",
            axis="sharding",
        )


def check_installed(layout: Layout) -> None:
    """Return if the library that ``layout`` asks for is there; does not import it.

    Raises:
        EngineMissing: it is not.
    """
    if layout.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise EngineMissing(
            "layout.sharding is deepspeed, but the package deepspeed is not installed. "
            "Run `pip install evermesh[deepspeed]` on every machine, or leave layout.sharding out."
        )

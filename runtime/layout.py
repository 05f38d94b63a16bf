"""Which layouts the trainer can run; imports no torch, so that the launcher can ask before it starts anything."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.experts.sharding import check_degrees
from evermesh.parallelism.heads import check_heads
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.mesh import Mesh
from evermesh.runtime.deepspeed_engine.checks import check_config, check_installed
from evermesh.runtime.deepspeed_engine.checks import check_degrees as check_deepspeed_degrees
from evermesh.runtime.model.sharding import DECODER_SHARDING
from evermesh.runtime.model.stages import nominal_costs, stage_parts

if TYPE_CHECKING:
    from evermesh.runtime.config import CompileConfig, TrainConfig
    from evermesh.runtime.model.config import ModelConfig


def check_layout(config: "TrainConfig") -> None:
    """Return if the trainer can run ``config`` on ``layout.world_size`` workers.

    Raises:
        LayoutDoesNotFit: names the degree that cannot work, the numbers, and degrees that can.
        EngineMissing: a library that it needs is not installed.
    """
    check_model(config.layout, config.model)
    check_config(config)
    check_installed(config.layout)
    Mesh.of(config.layout)
    _ = config.layout.division  # refuses tiers that do not divide the ranks


def check_model(layout: Layout, model: "ModelConfig") -> None:
    """Return if ``model`` can be shared as ``layout`` says, on any number of HDP ranks.

    Raises:
        LayoutDoesNotFit: see ``check_layout``.
    """
    if not isinstance(layout.activations, str) and len(layout.activations) != model.layers:
        raise LayoutDoesNotFit(
            f"layout.activations names {len(layout.activations)} blocks, but the model has {model.layers} layers. Name as "
            "many, or give one word for all.",
            axis="activations",
        )
    check_deepspeed_degrees(layout)
    _check_chunks(layout)
    DECODER_SHARDING.check_degree(layout.tp, model.model_dump())
    check_heads(layout, model.heads, model.kv_heads)
    stage_parts(model, layout, nominal_costs(model, model.vocabulary or 1))
    if layout.hot_experts and layout.ep == 1:
        raise LayoutDoesNotFit(
            f"layout.hot_experts is {layout.hot_experts}, but with layout.ep 1 every rank holds all experts. Leave it out, "
            "or share the experts with layout.ep.",
            axis="hot_experts",
        )
    if model.moe is not None:
        check_degrees(layout.ep, layout.etp, experts=model.moe.experts, ffn=model.moe.ffn)
    elif layout.ep * layout.etp > 1:
        axis = "ep" if layout.ep > 1 else "etp"
        raise LayoutDoesNotFit(
            f"layout.{axis} is {getattr(layout, axis)}, but the model has no experts to share. Leave it out, or describe the "
            f"experts under model.moe.",
            axis=axis,
        )


def changed_layout(layout: Layout, changes: Mapping[str, object]) -> Layout:
    """``layout`` with these fields changed; unless they name hdp, it is what the other degrees leave of the ranks.

    Raises:
        ValidationError, LayoutDoesNotFit: there is no such layout on this number of ranks.
    """
    after = Layout.model_validate(layout.model_dump() | dict(changes))
    return after if "hdp" in changes else after.fitted_to(layout.world_size)


def is_supported(layout: Layout, model: "ModelConfig", compiles: "CompileConfig | None" = None) -> bool:
    """Whether ``model`` can be shared, and its blocks compiled, as ``layout`` says, on any number of HDP ranks."""
    # the checks do not look at these, so that one answer serves many layouts
    return _is_supported(
        layout.model_copy(update={"hdp": 1, "capacity": 1, "sharding": Layout().sharding}), model, compiles
    )


@functools.lru_cache(maxsize=65_536)
def _is_supported(layout: Layout, model: "ModelConfig", compiles: "CompileConfig | None") -> bool:
    try:
        check_model(layout, model)
        if compiles is not None:
            check_compile(layout, compiles.of_capacity(layout.capacity))
    except LayoutDoesNotFit:
        return False
    return True


def _check_chunks(layout: Layout) -> None:
    if layout.tp_chunks == 1:
        return
    if layout.tp == 1:
        raise LayoutDoesNotFit(
            f"layout.tp_chunks is {layout.tp_chunks}, but with layout.tp 1 no tokens are gathered that could arrive in "
            "parts. Leave it out, or share the model with layout.tp.",
            axis="tp_chunks",
        )
    if "offload" in layout.activation_policies:
        raise LayoutDoesNotFit(
            f"layout.tp_chunks is {layout.tp_chunks}, but layout.activations is {layout.activations}: of a block that "
            "offloads, the first tokens wait on the host, not the first of every part. Set layout.tp_chunks to 1, or "
            "layout.activations to recompute or keep.",
            axis="tp_chunks",
        )


def check_compile(layout: Layout, buckets: Sequence[int]) -> None:
    """Return if blocks of this layout can be compiled for ``buckets`` of tokens.

    Raises:
        LayoutDoesNotFit: names what cannot be compiled, and what can.
    """
    if buckets[-1] < layout.capacity:
        raise LayoutDoesNotFit(
            f"train.compile.buckets end at {buckets[-1]} tokens, but a micro-batch can have {layout.capacity} "
            f"(layout.capacity). Add {layout.capacity} to them, or set layout.capacity to {buckets[-1]}."
        )
    if layout.tp_chunks > 1:
        raise LayoutDoesNotFit(
            f"layout.tp_chunks is {layout.tp_chunks}, but blocks are compiled for whole buckets of tokens, not for parts of "
            "them. Set layout.tp_chunks to 1, or leave train.compile out.",
            axis="tp_chunks",
        )
    if "offload" in layout.activation_policies:
        raise LayoutDoesNotFit(
            f"layout.activations is {layout.activations}, but the products of compiled blocks cannot be taken out of them. "
            "Set layout.activations to recompute or keep, or leave train.compile out.",
            axis="activations",
        )
    if layout.pipeline.splits_backward:
        raise LayoutDoesNotFit(
            f"layout.schedule is {layout.schedule}, but compiled blocks cannot put off the gradients of their weights. "
            f"Set layout.schedule to {'1f1b' if layout.virtual_stages == 1 else 'interleaved-1f1b'}, or leave "
            "train.compile out.",
            axis="schedule",
        )

"""Sharded data parallelism over the HDP ranks: FSDP2 of torch, one unit per decoder layer and one for the rest.

The ranks of a plan run different numbers of micro-batches, some none, and meet in rings in between. So nothing here
communicates inside a micro-batch: parameters are gathered once before the first and gradients are summed once behind the
last, in one order on all ranks. In between every rank holds the parameters and gradients of the whole model (of its
tensor-parallel part); between steps it holds its share of them, as in ZeRO-3 (Rajbhandari et al., arXiv 1910.02054).
Gradients are summed, not averaged: tokens are already weighted.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from evermesh.parallelism.collectives import Communicator
from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.group_making import alone
from evermesh.runtime.process_group import Groups

GATHER, REDUCE = "parameters", "gradients"
"""Call sites."""


def device_mesh(groups: Groups, device_type: str) -> DeviceMesh:
    """The axes hdp x tp over the groups that there are already."""
    hdp, tp = groups.hdp.size, groups.tp.size
    ranks = torch.arange(hdp * tp).view(hdp, tp)
    own = [axis.group or alone() for axis in (groups.hdp, groups.tp)]
    return DeviceMesh.from_group(own, device_type, mesh=ranks, mesh_dim_names=("hdp", "tp"))


class ShardedModel:
    """The parameters of a model, sharded along dim 0 over the ranks of ``hdp``. Every rank makes one, in place.

    Args:
        model: after tensor parallelism.
        layers: the parts that are units of their own; the rest is one more.
        mesh: the axis of ``hdp`` alone.
        hdp: the ranks.
        dtype: what is computed in, where parameters are kept in another type; gradients are summed in theirs.

    Raises:
        UnsupportedModel: this release of torch lacks something that is used here.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[Any],
        mesh: DeviceMesh,
        hdp: Communicator,
        dtype: torch.dtype | None,
    ) -> None:
        stored = next(model.parameters()).dtype
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=stored) if dtype else MixedPrecisionPolicy()
        units = (*layers, model)  # the inner ones first
        for unit in units:
            fully_shard(unit, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        self._root, self._units = model, units
        _check_release(self._root)
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_custom_all_gather(_TappedAllGather(hdp))
            unit.set_custom_reduce_scatter(_TappedReduceScatter(hdp))
        # a rank without tokens, or a part that its tokens never reach, gives zeros
        self._root.set_reduce_scatter_unused_params(True)
        self._hold(True)

    def gather(self) -> None:
        """Give every rank the parameters of the whole model. Collective."""
        self._root._get_fsdp_state()._lazy_init()  # a rank without tokens has no forward pass that would do it
        for unit in self._units:
            unit.unshard()

    def release(self) -> None:
        """Leave every rank its own part of the parameters."""
        for unit in self._units:
            unit.reshard()

    def reduce(self) -> None:
        """Add the sum of all ranks' gradients to this rank's part of them, and release the parameters. Collective."""
        self._hold(False)
        # what FSDP2 does behind the last backward pass of a step; not every rank has had one
        self._root._get_fsdp_state()._root_post_backward_final_callback()
        self._hold(True)
        self.release()

    def _hold(self, hold: bool) -> None:
        """Whether a backward pass leaves gradients and parameters where they are."""
        self._root.set_requires_gradient_sync(not hold)
        self._root.set_reshard_after_backward(not hold)


def _check_release(model: Any) -> None:
    needed = ("set_custom_all_gather", "set_custom_reduce_scatter", "set_reduce_scatter_unused_params")
    missing = [name for name in needed if not hasattr(model, name)]
    state = model._get_fsdp_state()
    missing += [name for name in ("_lazy_init", "_root_post_backward_final_callback") if not hasattr(state, name)]
    if missing:
        raise UnsupportedModel(
            f"FSDP2 of torch {torch.__version__} has no {', '.join(missing)}, which models of transformers need here. "
            "Install torch 2.13."
        )


class _Tapped:
    """What FSDP2 asks to communicate, through the tap."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for one call."""
        return torch.empty(*size, dtype=dtype, device=device)


class _TappedAllGather(_Tapped):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        self.communicator.all_gather(output_tensor, input_tensor, GATHER)


class _TappedReduceScatter(_Tapped):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        assert op == dist.ReduceOp.SUM, f"{op} asked for, where tokens are weighted already"
        self.communicator.reduce_scatter(output_tensor, input_tensor, REDUCE)

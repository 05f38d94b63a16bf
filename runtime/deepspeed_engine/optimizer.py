"""The parameters, gradients and moments of one rank inside DeepSpeed's ZeRO optimizers, under our contract.

Names of the library that are no public interface are used in this file only; ``Partitioned`` says for what.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evermesh.runtime.deepspeed_engine.library import LibraryTap
from evermesh.runtime.deepspeed_engine.partitions import Fragment
from evermesh.runtime.errors import EngineDiffers
from evermesh.runtime.optimizer import KINDS, ShardedOptimizer
from evermesh.runtime.optimizer_config import AdamWConfig


class Place(NamedTuple):
    """Where a rank keeps what it holds of a parameter: ``length`` elements of one of its flat tensors, from ``offset``."""

    flat: Tensor
    offset: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same place in another tensor of that layout."""
        return tensor.detach().narrow(0, self.offset, self.length)


class Partitioned(ABC):
    """What one rank holds inside ZeRO."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero

    @property
    @abstractmethod
    def flats(self) -> list[Tensor]:
        """Master parameters, float32, one tensor after the other as they are stepped."""

    @abstractmethod
    def place(self, parameter: nn.Parameter, fragment: Fragment) -> Place:
        """Where ``fragment`` is.

        Raises:
            EngineDiffers: the library holds another part of the parameter than we think.
        """

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The summed gradients of this rank's part, after the last backward pass of a step; what is padding is zero."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all gradients, also those of a step that was not made."""

    @abstractmethod
    def refresh(self) -> None:
        """Copy the master parameters into those of the model. Collective."""


class Stage12(Partitioned):
    """The parameters are whole on every rank; a partition of every group is stepped."""

    @property
    def flats(self) -> list[Tensor]:
        """See ``Partitioned``."""
        return list(self.zero.single_partition_of_fp32_groups)

    def place(self, parameter: nn.Parameter, fragment: Fragment) -> Place:
        """See ``Partitioned``."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        seen = mapping.lp_fragment_address if mapping is not None else None
        if seen is None or (seen.start, seen.start + seen.numel) != (fragment.start, fragment.stop):
            raise _differs(fragment, f"[{seen.start}, {seen.start + seen.numel})" if seen is not None else "nothing")
        return Place(self.flats[mapping.param_group_index], mapping.hp_fragment_address.start, seen.numel)

    def gradients(self) -> list[Tensor]:
        """See ``Partitioned``."""
        if self.zero.cpu_offload:
            return [_gradient(flat) for flat in self.flats]
        return [part for group in range(len(self.flats)) for part in self.zero.averaged_gradients[group]]

    def clear(self) -> None:
        """See ``Partitioned``."""
        self.zero.zero_grad(set_to_none=True)
        self.zero.micro_step_id = -1
        if self.zero.cpu_offload:
            self.zero.reset_cpu_buffers()
        for group in range(len(self.flats)):
            self.zero.averaged_gradients[group] = None
            self.zero.all_grad_tensors[group] = None

    def refresh(self) -> None:
        """See ``Partitioned``."""
        self.zero.update_lp_params()


class Stage3(Partitioned):
    """A partition of every parameter is held and stepped; parameters are whole only while they are used."""

    @property
    def flats(self) -> list[Tensor]:
        """See ``Partitioned``."""
        return list(self.zero.fp32_partitioned_groups_flat)

    def place(self, parameter: nn.Parameter, fragment: Fragment) -> Place:
        """See ``Partitioned``."""
        flat, offset, part = self.zero.grad_position[self.zero.get_param_id(parameter)]
        size = parameter.ds_numel  # type: ignore[attr-defined]
        start, stop = min(size, fragment.rank * part), min(size, (fragment.rank + 1) * part)
        if (start, stop) != (fragment.start, fragment.stop):
            raise _differs(fragment, f"[{start}, {stop})")
        return Place(self.flats[flat], offset, stop - start)

    def gradients(self) -> list[Tensor]:
        """See ``Partitioned``."""
        if self.zero.offload_optimizer:
            return [_gradient(flat) for flat in self.flats]
        return [self.zero.grad_partitions_flat_buffer]

    def clear(self) -> None:
        """See ``Partitioned``."""
        self.zero.zero_grad(set_to_none=True)  # the first micro-batch overwrites the buffer that it leaves
        if self.zero.offload_optimizer:
            self.zero.reset_cpu_buffers()
        self.zero.averaged_gradients = {}

    def refresh(self) -> None:
        """See ``Partitioned``."""
        self.zero._partition_all_parameters()  # nobody computes with an old copy
        for group in range(len(self.flats)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


class EngineAdamW(ShardedOptimizer):
    """AdamW inside DeepSpeed: the library sums, steps and gathers; rate, clipping and guard are ours.

    Args:
        engine: the library's engine.
        parts: this rank's part of everything.
        parameters: of the model, by name.
        fragments: what this rank holds of them.
        config: rates and decay.
        tap: told what the library sends for what.
    """

    def __init__(
        self,
        engine: Any,
        parts: Partitioned,
        parameters: Mapping[str, nn.Parameter],
        fragments: Sequence[Fragment],
        config: AdamWConfig,
        tap: LibraryTap,
    ) -> None:
        super().__init__([], config)
        self.engine, self.parts, self.tap = engine, parts, tap
        self._adamw = engine.optimizer.optimizer
        self._moments = {flat: (torch.zeros_like(flat), torch.zeros_like(flat)) for flat in parts.flats}
        self._places = {of.name: parts.place(parameters[of.name], of) for of in fragments}
        self.restore(steps=0)

    def restore(self, steps: int) -> None:
        """Continue after ``steps`` updates with what the partitions hold now."""
        for flat, (exp_avg, exp_avg_sq) in self._moments.items():
            is_torch = isinstance(self._adamw, torch.optim.AdamW)
            step = torch.tensor(float(steps), device=flat.device) if is_torch else steps
            self._adamw.state[flat] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float) -> None:
        """Update this rank's part with its gradients times ``gradient_scale``; the library gathers. Collective."""
        self.update(lr, gradient_scale)

    def update(self, lr: float, gradient_scale: float) -> None:
        """See ``step``."""
        for gradient in self.parts.gradients() if gradient_scale != 1.0 else ():
            gradient.mul_(gradient_scale)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self.tap.sums = "norms"
        self.engine.step()
        self.tap.sums = "gradients"
        if not self.engine.was_step_applied():
            raise EngineDiffers(
                "DeepSpeed left out an update whose loss and gradients are finite: their squares exceed float32. Set "
                "optimizer.clip_norm, or lower optimizer.lr."
            )

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master parameters into those of the model. Collective."""
        self.parts.refresh()

    def owned_state(self) -> dict[str, list[Tensor]]:
        """This rank's part of every tensor that must survive, by checkpoint name, as views of the live state."""
        return {name: [tensor] for name, tensor in self._owned()}

    def _owned(self) -> Iterator[tuple[str, Tensor]]:
        for name, place in self._places.items():
            states = (place.flat, *self._moments[place.flat])
            for kind, state in zip(KINDS, states, strict=True):
                yield f"{kind}.{name}", place.of(state)


def square_of(gradients: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements; a float64 scalar."""
    return torch.stack([gradient.to(torch.float64).square().sum() for gradient in gradients]).sum()


def _gradient(flat: Tensor) -> Tensor:
    assert flat.grad is not None, "offloaded partitions keep their gradients"
    return flat.grad


def _differs(fragment: Fragment, held: str) -> EngineDiffers:
    return EngineDiffers(
        f"this version of DeepSpeed gives rank {fragment.rank} {held} of {fragment.name}, where elements "
        f"[{fragment.start}, {fragment.stop}) are expected. Install one that is tested: see constraints.txt."
    )

"""Parameters of one rank's model in flat buffers: their values, their gradients, and the ranks they are divided among.

Shape of everything that happens to a set in a step: gather the values (where ranks divide them), add gradients up, sum them
over the owners, and, behind the update, publish what each owner has stepped.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor, nn

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.gradients import keep_gradient
from evermesh.parallelism.tensor import Cut
from evermesh.parallelism.tiers import Division, Level
from evermesh.runtime.flat import AnyCut, FlatLayout

if TYPE_CHECKING:
    import torch.distributed as dist

GATHER = "sharded parameters"
"""Call site of values that are gathered for a computation."""


class Owners(NamedTuple):
    """The ranks that hold the same part of a model, and their groups, level by level (``Division.groups``)."""

    all: Communicator = Communicator()
    division: Division = Division()
    parameters: Communicator = Communicator()
    gradients: Communicator = Communicator()
    sums: Communicator = Communicator()
    states: Communicator = Communicator()

    @classmethod
    def of_states(cls, owners: Communicator) -> "Owners":
        """They divide only the optimizer states."""
        return cls(owners, Division.of_states(owners.size), sums=owners, states=owners)

    @property
    def rank(self) -> int:
        """This rank's number among them."""
        return self.all.rank

    def at(self, level: Level) -> Communicator:
        """This rank's group of a level."""
        found: Communicator = getattr(self, level)
        return found


class Sharers(NamedTuple):
    """The ranks that hold different parts of the same parameters."""

    all: Communicator = Communicator()
    """The ranks over which the gradients of what they hold alike are summed."""
    number: int = 0
    """Which sharer this rank is: it says which part of a parameter it holds."""
    parts: Communicator | None = None
    """The ranks that hold the parts of the same layers, an expert being a layer; None: ``all``."""


class Reductions:
    """Sums of gradients that begin during a backward pass: one is on its way while the next block computes."""

    def __init__(self) -> None:
        self._last: ParameterSet | None = None

    def begin(self, parameters: "ParameterSet") -> None:
        """Finish the one before; ``parameters`` is about to start the next."""
        if self._last is not None:
            self._last.finish_reduce()
        self._last = parameters


class ParameterSet:
    """Parameters that are cut and replicated over the same axes: of a model, or of a block of it.

    They become views of one flat buffer. Where the owners divide the values, the buffer is empty until ``gather``.

    Args:
        parameters: by name, one sharer's part of each.
        cuts: of these parameters.
        owners: who sums their gradients and divides values, gradients and states.
        sharers: who holds the other parts.
        keeps_gradients: whether whole gradients add up until the end of a step; else only this rank's part of their sum,
            to which ``reduce`` adds.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        cuts: Mapping[str, AnyCut],
        owners: Owners,
        sharers: Sharers | None = None,
        *,
        keeps_gradients: bool = True,
    ) -> None:
        self.flat, self.owners, self.sharers = FlatLayout(cuts, owners.division), owners, sharers or Sharers()
        self.parameters, self.keeps_gradients = parameters, keeps_gradients
        like = next(iter(parameters.values()))
        self._values = torch.zeros(self.flat.padded, dtype=like.dtype, device=like.device)
        for entry in self.flat.entries:
            parameter = parameters[entry.name]
            view = self._view(self._values, entry.start, parameter)
            view.copy_(parameter.detach())
            parameter.data = view
        self.owned = self.flat.owned(owners.rank)
        gradient_dtype = torch.promote_types(like.dtype, torch.float32)
        kept = slice(0, self.flat.padded) if keeps_gradients else self.flat.gradient_part(owners.rank)
        self.gradients = torch.zeros(kept.stop - kept.start, dtype=gradient_dtype, device=like.device)
        """Whole, or this rank's part of their sum; at least float32."""
        if keeps_gradients:
            for entry in self.flat.entries:
                parameter = parameters[entry.name]
                keep_gradient(parameter, self._view(self.gradients, entry.start, parameter))
        self.reductions = Reductions()
        """Shared by the sets of a model."""
        self.reduces_itself = False
        """Whether a hook calls ``reduce`` when the gradients are there."""
        self.is_divided = owners.division.parameters > 1
        self._part = self._values[self.flat.parameter_part(owners.rank)]
        """What this rank holds of the values between gathers: all of them, where nobody divides them."""
        self._is_gathered = True
        self._gathering: dist.Work | None = None
        self._reducing: tuple[dist.Work | None, Tensor] | None = None
        self._summed = self.gradients
        if self.is_divided:
            self._part = self._part.clone()
            self.free()

    @classmethod
    def whole(cls, model: nn.Module, owners: Communicator | None = None) -> Self:
        """All parameters of a model of which nothing is cut; ``owners`` divide only the states."""
        parameters = dict(model.named_parameters())
        cuts = {name: Cut(tuple(parameter.shape)) for name, parameter in parameters.items()}
        return cls(parameters, cuts, Owners.of_states(owners or Communicator()))

    @staticmethod
    def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
        return buffer[start : start + like.numel()].view(like.shape)

    @property
    def held_bytes(self) -> dict[str, int]:
        """Bytes of tensors that this rank holds now: its part of the values, those it has gathered, and gradients."""
        gathered = self._values.untyped_storage().nbytes() if self.is_divided else 0
        gradients = [parameter.grad for parameter in self.parameters.values() if not self.keeps_gradients]
        passing = [gradient for gradient in (*gradients, self._reducing and self._reducing[1]) if gradient is not None]
        if self._summed is not self.gradients:
            passing.append(self._summed)
        return {
            "parameters": self._part.nbytes,
            "gathered": gathered,
            "gradients": self.gradients.nbytes,
            "passing": sum(tensor.nbytes for tensor in passing),
        }

    @property
    def owned_values(self) -> Tensor:
        """What this rank steps, as it was last published."""
        return self._part[within(self.owned, self.flat.parameter_part(self.owners.rank))]

    @property
    def kept_values(self) -> Tensor:
        """What this rank holds of the values between gathers; all of them, where nobody divides them."""
        return self._part

    def start_gather(self) -> None:
        """Begin to gather the values, if they are divided and not here. Collective over the owners that divide them."""
        if self._is_gathered:
            return
        self._values.untyped_storage().resize_(self._values.numel() * self._values.element_size())
        self._gathering = self.owners.parameters.start_all_gather(self._values, self._part, GATHER)
        self._is_gathered = True

    def gather(self) -> None:
        """Return when all values are here. Collective as ``start_gather`` is, unless that was called."""
        self.start_gather()
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def free(self) -> None:
        """Give the memory of values back that other ranks hold; whoever wants to compute with them gathers them again."""
        if self.is_divided and self._is_gathered:
            self.gather()  # nobody may still be writing
            self._values.untyped_storage().resize_(0)
            self._is_gathered = False

    @torch.no_grad()
    def publish(self, master: Tensor) -> None:
        """Take over what every owner has stepped; ``master`` is this rank's interval, which may be ``owned_values`` itself.
        Collective over the owners."""
        owners, interval = self.owners, master.to(self._values.dtype)
        part = self._part
        if owners.gradients.size > 1:
            own = torch.empty(self.flat.padded // owners.division.gradients, dtype=part.dtype, device=part.device)
            owners.states.all_gather(own, interval, "parameters")
            owners.gradients.all_gather(part, own, "parameters")
        else:
            owners.states.all_gather(part, interval, "parameters")
        if self.is_divided and self._is_gathered:
            self.free()  # they are the old ones

    def begin_step(self) -> None:
        """Forget the gradients of the last step."""
        self.gradients.zero_()

    def end_step(self) -> None:
        """Give memory back: of gathered values, and of the sum of the gradients."""
        self.free()
        self._summed = self.gradients

    @torch.no_grad()
    def reduce(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Begin to add gradients to this rank's part of their sum; by default what backward passes left in the parameters,
        which is taken from them.

        Collective over the owners that divide gradients. The sum is finished when the next one of the model begins, or by
        ``finish_reduce``.
        """
        self.reductions.begin(self)
        whole = torch.zeros(self.flat.padded, dtype=self.gradients.dtype, device=self.gradients.device)
        for entry in self.flat.entries:
            parameter = self.parameters[entry.name]
            gradient = parameter.grad if gradients is None else gradients.get(entry.name)
            if gradient is not None:
                self._view(whole, entry.start, parameter).copy_(gradient)
            if gradients is None:
                parameter.grad = None
        self._reducing = self._start_sum(whole)

    @torch.no_grad()
    def finish_reduce(self) -> None:
        """Return when the sum that ``reduce`` began is complete. Collective as that is."""
        if self._reducing is not None:
            work, part = self._reducing
            self._reducing = None
            self.gradients += self._finish_sum(work, part)

    def _start_sum(self, whole: Tensor) -> "tuple[dist.Work | None, Tensor]":
        """Sum over the owners that divide the parameters: what is under way, and this rank's part."""
        if not self.is_divided:
            return None, whole
        part = whole.new_empty(self.flat.padded // self.owners.division.parameters)
        return self.owners.parameters.start_reduce_scatter(part, whole, "gradients"), part

    def _finish_sum(self, work: "dist.Work | None", part: Tensor) -> Tensor:
        if work is not None:
            work.wait()
        if self.owners.gradients.size == 1:
            return part
        summed = part.new_empty(self.flat.padded // self.owners.division.gradients)
        self.owners.gradients.reduce_scatter(summed, part, "gradients")
        return summed

    @torch.no_grad()
    def sum_gradients(self) -> Tensor:
        """Sum the gradients of all ranks; returns this rank's part of the square of their norm, a float64 scalar.

        Collective over owners and sharers. What several ranks hold alike counts once, on the first of them.
        """
        owners, sharers = self.owners, self.sharers
        self.finish_reduce()
        if self.keeps_gradients:
            self._summed = self._finish_sum(*self._start_sum(self.gradients))
        owners.sums.all_reduce(self._summed, "gradients")
        held = self.flat.gradient_part(owners.rank)
        alike = within(self.flat.replicated, held)
        # each saw its own tokens only; last, so that these ranks have the same bits of what they hold alike
        if alike.stop > alike.start:
            sharers.all.all_reduce(self._summed[alike], "gradients")
        owned, alike = within(self.owned, held), within(self.flat.replicated, self.owned)
        mine = self._summed[owned]
        counted = (mine,) if sharers.number == 0 else (mine[: alike.start], mine[alike.stop :])
        square = torch.stack([part.to(torch.float64).square().sum() for part in counted]).sum()
        return square if owners.division.is_first_replica(owners.rank) else torch.zeros_like(square)

    @property
    def owned_gradient(self) -> Tensor:
        """The summed gradient of what this rank steps, after ``sum_gradients``."""
        return self._summed[within(self.owned, self.flat.gradient_part(self.owners.rank))]


def within(part: slice, whole: slice) -> slice:
    """What ``part`` and ``whole`` have in common, counted from the start of ``whole``."""
    start, stop = (min(max(edge, whole.start), whole.stop) - whole.start for edge in (part.start, part.stop))
    return slice(start, stop)


def sum_gradients(sets: Sequence[ParameterSet]) -> Tensor:
    """Sum the gradients of all ranks; returns this rank's part of the square of their norm, a float64 scalar.

    Collective over the axes of every set.
    """
    return torch.stack([parameters.sum_gradients() for parameters in sets]).sum()

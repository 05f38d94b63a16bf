"""Bytes that one rank needs for what it trains: parameters, gradients and optimizer states, by formula.

Activations are not in it; they are bounded by the capacity of a micro-batch. Imports no torch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from evermesh.parallelism.layout import Layout
from evermesh.parallelism.tiers_traffic import SetSizes


@dataclass(frozen=True, slots=True)
class StateMemory:
    """Bytes of one rank."""

    parameters: int
    """That it holds between steps."""
    gathered: int
    """Parameters of other ranks that it holds at most beside them: all of them, or two neighbouring blocks."""
    gradients: int
    """That add up during a step."""
    passing: int
    """Of gradients on their way into a sum, at most."""
    states: int
    """Both moments, and master parameters where parameters have less than four bytes."""

    @property
    def peak(self) -> int:
        """The most at any time of a step."""
        return self.parameters + self.gathered + self.gradients + self.passing + self.states

    def __str__(self) -> str:
        kinds = ("parameters", "gathered", "gradients", "passing", "states")
        parts = ", ".join(f"{kind} {getattr(self, kind) / 2**20:,.1f}" for kind in kinds if getattr(self, kind))
        return f"{self.peak / 2**20:,.1f} MiB per rank at most, activations apart ({parts})"


def state_memory(sets: Sequence[SetSizes], layout: Layout, element_bytes: int) -> StateMemory:
    """Of a rank with these sets; ``element_bytes`` of a parameter. Gradients and states have at least four."""
    wide = max(4, element_bytes)
    parameters = gradients = states = divided = kept_sums = 0
    by_block: Counter[object] = Counter()
    passing = [0]
    for number, sizes in enumerate(sets):
        division = layout.expert_division if sizes.of_experts else layout.division
        parameters += sizes.padded // division.parameters * element_bytes
        states += (2 if element_bytes == wide else 3) * (sizes.padded // division.states) * wide
        if division.parameters > 1:
            divided += sizes.padded * element_bytes
            by_block[("layer", sizes.layer) if sizes.layer is not None else number] += sizes.padded * element_bytes
        if layout.keeps_gradients or division.gradients == 1:
            gradients += sizes.padded * wide
            if division.gradients > 1:  # the summed part stays until the update
                kept_sums += sizes.padded // division.gradients * wide
                passing.append(sizes.padded // division.parameters * wide if division.parameters > 1 else 0)
        else:
            gradients += sizes.padded // division.gradients * wide
            # what the backward pass made, the buffer that is summed, and this rank's part of it
            parts = sizes.padded // division.parameters + sizes.padded // division.gradients
            passing.append(sizes.padded * (element_bytes + wide) + parts * wide)
    gathered = sum(size for _, size in by_block.most_common(2)) if layout.tiers.in_lock_step else divided
    return StateMemory(parameters, gathered, gradients, kept_sums + max(passing), states)


__all__ = ["StateMemory", "state_memory"]

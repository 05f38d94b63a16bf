"""One bit of a live tensor."""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evermesh.fault.injection.schedule import Flip


class Bit(NamedTuple):
    """One bit of one element. ``bit`` 0 is the lowest of the mantissa."""

    name: str
    region: Tensor
    """Contiguous; it is flipped in place."""
    element: int
    bit: int

    def flip(self) -> None:
        """Flip it."""
        size = self.region.element_size()
        values = self.region.detach().view(-1).view(torch.uint8)
        values[self.element * size + self.bit // 8] ^= 1 << self.bit % 8

    def __str__(self) -> str:
        value = self.region.detach().view(-1)[self.element].item()
        return f"bit {self.bit} of element {self.element} of {self.name}, which was {value:g}"


def choose_bit(fault: Flip, tensors: Mapping[str, Sequence[Tensor]], seed: str) -> Bit:
    """The bit that ``fault`` means among the tensors of a rank, little-endian; what it leaves open is drawn.

    Raises:
        LookupError: this rank holds no such tensor, element or bit; names what it holds.
    """
    chance = random.Random(seed)
    regions = [(name, region) for name, held in sorted(tensors.items()) for region in held if region.numel()]
    if fault.tensor is not None:
        regions = [(name, region) for name, region in regions if name == fault.tensor]
    if not regions:
        held = ", ".join(sorted(tensors)) or "none"
        raise LookupError(f"this rank holds no {fault.what} {fault.tensor or 'at all'}; it holds {held}.")
    name, region = chance.choices(regions, [region.numel() for _, region in regions])[0]
    bits = region.element_size() * 8
    element = chance.randrange(region.numel()) if fault.element is None else fault.element
    bit = chance.randrange(bits) if fault.bit is None else fault.bit
    if element >= region.numel() or bit >= bits:
        raise LookupError(
            f"{name} has {region.numel()} elements of {bits} bits on this rank, but {fault} was asked for."
        )
    return Bit(name, region, element, bit)

"""From what ranks send to what cards send: the flows of a job that leave its nodes.

- A collective visits the nodes of its group one after the other, as NCCL's rings do, and is spread over the cards of the
  ranks that the group has on a node, each card to the one on the same rail (``NCCL_CROSS_NIC=0``). Or along NCCL's
  double binary tree, which sends as many bytes but none around.
- A message leaves through the card on the rail of its receiver, where the node has one: it goes there over the links inside
  the node first (PXN, on by default in NCCL). Without PXN it leaves through the card of the sender, and changes rails.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from evermesh.parallelism.fabric.exchanges import Collective, Exchange, Messages
from evermesh.parallelism.fabric.trees import parents
from evermesh.parallelism.fabric.wiring import Floats, Ints, Wiring
from evermesh.parallelism.links import Operation

Algorithm = Literal["ring", "tree"]


class Label(NamedTuple):
    """What a flow is part of."""

    axis: str
    call_site: str
    operation: Operation


@dataclass(frozen=True, slots=True)
class Flows:
    """What cards send to cards of other nodes in a step, one row for each label and pair."""

    labels: tuple[Label, ...]
    label: Ints
    source: Ints
    """Card that sends."""
    target: Ints
    num_bytes: Floats

    def __len__(self) -> int:
        return len(self.label)

    @property
    def total_bytes(self) -> float:
        """Of all flows."""
        return float(self.num_bytes.sum())


class _Columns(NamedTuple):
    source: Sequence[int] | Ints
    target: Sequence[int] | Ints
    num_bytes: Sequence[float] | Floats


def flows_of(
    exchanges: Iterable[Exchange], wiring: Wiring, *, algorithm: Algorithm = "ring", pxn: bool = True
) -> Flows:
    """The flows of a job on the nodes of ``wiring``; ``algorithm`` of all-reduces, other collectives are rings."""
    cards = np.array([wiring.card_of(rank) for rank in range(wiring.world_size)], np.int64)
    of_rail = _rail_table(wiring)
    found: dict[Label, list[_Columns]] = {}
    for one in exchanges:
        label = Label(one.axis, one.call_site, one.operation)
        if isinstance(one, Messages):
            columns = _messages(one, wiring, cards, of_rail, pxn=pxn)
        else:
            columns = _collective(one, wiring, cards, algorithm)
        found.setdefault(label, []).append(columns)
    return _joined(found, len(wiring.cards))


def _rail_table(wiring: Wiring) -> Ints:
    """The card of every place on every rail; -1: none, or none with a cable."""
    rails = 1 + max((card.nic.rail for card in wiring.cards), default=0)
    table = np.full((len(wiring.nodes), rails), -1, np.int64)
    for number, card in reversed(list(enumerate(wiring.cards))):
        if wiring.is_alive(number):
            table[card.place, card.nic.rail] = number
    return table


def _messages(one: Messages, wiring: Wiring, cards: Ints, of_rail: Ints, *, pxn: bool) -> _Columns:
    source, target = cards[one.senders], cards[one.receivers]
    if pxn:
        rails = np.array([card.nic.rail for card in wiring.cards], np.int64)
        preferred = of_rail[one.senders // wiring.devices, rails[target]]
        source = np.where((rails[source] == rails[target]) | (preferred < 0), source, preferred)
    return _Columns(source, target, one.num_bytes)


def _collective(one: Collective, wiring: Wiring, cards: Ints, algorithm: Algorithm) -> _Columns:
    """Between the nodes of a group."""
    places = [rank // wiring.devices for rank in one.ranks]
    starts = [at for at, place in enumerate(places) if at == 0 or place != places[at - 1]]
    own = [
        sorted({int(cards[rank]) for rank in one.ranks[start:stop]})
        for start, stop in zip(starts, [*starts[1:], len(places)], strict=True)
    ]
    if algorithm == "tree" and one.operation == "all_reduce":
        hops = _tree(len(own), one.payload_bytes)
    else:
        last = [start - 1 for start in (*starts[1:], len(places))]
        hops = ((at, (at + 1) % len(own), one.wire_bytes(position)) for at, position in enumerate(last))
    source, target, num_bytes = list[int](), list[int](), list[float]()
    for sender, receiver, size in hops:
        pairs = _pairs(own[sender], own[receiver], wiring)
        for a, b in pairs if size else ():
            source.append(a)
            target.append(b)
            num_bytes.append(size / len(pairs))
    return _Columns(source, target, num_bytes)


def _tree(number: int, payload_bytes: float) -> Iterator[tuple[int, int, float]]:
    """Sums go up in both trees, results come down."""
    for above in parents(number):
        for member, parent in enumerate(above):
            if parent is not None:
                yield member, parent, payload_bytes / 2
                yield parent, member, payload_bytes / 2


def _pairs(senders: Sequence[int], receivers: Sequence[int], wiring: Wiring) -> list[tuple[int, int]]:
    """Card to card on the same rail; where the two nodes have no rail in common, in turns."""
    rails = {wiring.cards[card].nic.rail: card for card in reversed(receivers)}
    kept = [(card, rails[rail]) for card in senders if (rail := wiring.cards[card].nic.rail) in rails]
    if kept:
        return kept
    number = max(len(senders), len(receivers))
    return [(senders[at % len(senders)], receivers[at % len(receivers)]) for at in range(number)]


def _joined(found: dict[Label, list[_Columns]], num_cards: int) -> Flows:
    """One row for each label and pair."""
    labels, parts = list[Label](), list[tuple[Ints, Ints, Ints, Floats]]()
    for label, columns in found.items():
        source, target = (np.concatenate([np.asarray(part[at], np.int64) for part in columns]) for at in range(2))
        num_bytes = np.concatenate([np.asarray(part.num_bytes, np.float64) for part in columns])
        pairs, inverse = np.unique(source * num_cards + target, return_inverse=True)
        if len(pairs):
            sums = np.bincount(inverse, num_bytes).astype(np.float64)
            parts.append((np.full(len(pairs), len(labels), np.int64), pairs // num_cards, pairs % num_cards, sums))
            labels.append(label)
    if not parts:
        none = np.zeros(0, np.int64)
        return Flows((), none, none, none, np.zeros(0))
    label_column, source, target = (np.concatenate([part[at] for part in parts]) for at in range(3))
    return Flows(tuple(labels), label_column, source, target, np.concatenate([part[3] for part in parts]))


__all__ = ["Algorithm", "Flows", "Label", "flows_of"]

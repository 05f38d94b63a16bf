"""What a layer may ask about the documents of its micro-batch, also those that other ranks hold parts of.

What balances experts, and who is dropped from a full one, is decided per document. A document may be shared by a ring of
HDP ranks, and its tokens by tensor-parallel ranks; they tell each other what their tokens chose, so that each decides as
one process with the whole document would.

Shape legend: T tokens of this HDP rank, t those of this tensor-parallel rank between modules (T padded and shared); D
documents; K experts per token; E experts; N tokens of all documents of which this HDP rank holds any.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evermesh.parallelism.batch_plan import MicroBatch, Piece
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.tensor.sharding import padded_length

CALL_SITE = "documents"
_SHIFTS_AND_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Of the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""


@dataclass(frozen=True, slots=True)
class WholeDocuments:
    """What all tokens of some documents chose; the first are those of this HDP rank, in its order."""

    documents_N: Tensor
    """Index of the document in the micro-batch."""
    positions_N: Tensor
    """Position in the document."""
    chosen_NK: Tensor


@dataclass
class TokenContext:
    """The documents of one micro-batch on this rank, and what its layers counted.

    Make one for every forward pass. Methods that take tokens of this rank are collective over ``tp`` and over the members
    of every ring, on all layers in the same order.
    """

    micro_batch: MicroBatch
    lengths: Sequence[int]
    """Tokens of every sequence of the batch."""
    identities: Sequence[str]
    """What every sequence of the batch is, whatever its place in the batch: its corpus, document and first token."""
    num_tokens: int
    """Tokens of the batch, over all ranks."""
    step: int = 0
    seed: int = 0
    hdp: Communicator = field(default_factory=Communicator)
    """The ranks over which rings are."""
    tp: Communicator = field(default_factory=Communicator)
    """The ranks that share the tokens of this HDP rank."""
    loads: dict[int, Tensor] = field(default_factory=dict)
    """By layer: how many tokens of this rank chose each expert, [E]. Set, not added: recomputation repeats it."""
    losses: dict[int, Tensor] = field(default_factory=dict)
    """By layer: this rank's part of the balancing loss, a scalar without gradient."""
    buckets: Sequence[int] = ()
    """Numbers of tokens that micro-batches are padded to; none: as few as their ranks need."""

    @property
    def num_own_tokens(self) -> int:
        """t, with padding."""
        return padded_length(self.micro_batch.num_tokens, self.tp.size, self.buckets) // self.tp.size

    def own_documents(self, device: torch.device) -> Tensor:
        """[t]: index of its document for every token of this rank; D for padding."""
        sizes = [piece.num_tokens for piece in self.micro_batch.pieces]
        padding = self.num_own_tokens * self.tp.size - sum(sizes)
        index = torch.arange(len(sizes) + 1).repeat_interleave(torch.tensor([*sizes, padding]))
        first = self.tp.rank * self.num_own_tokens
        return index[first : first + self.num_own_tokens].to(device)

    def document_lengths(self, device: torch.device) -> Tensor:
        """[D]: tokens of every whole document."""
        return torch.tensor([self.lengths[piece.sequence] for piece in self.micro_batch.pieces], device=device).long()

    def counts(self, chosen_tK: Tensor, num_experts: int) -> Tensor:
        """[D, E]: how many tokens of each whole document chose each expert. Collective.

        Args:
            chosen_tK: experts of this rank's tokens; of padding, anything.
            num_experts: E.
        """
        num_documents = len(self.micro_batch.pieces)
        bins_tK = self.own_documents(chosen_tK.device).unsqueeze(1) * num_experts + chosen_tK
        bins_tK = bins_tK.clamp_max(num_documents * num_experts)
        counts = torch.bincount(bins_tK.flatten(), minlength=num_documents * num_experts + 1)
        counts_DE = counts[:-1].view(num_documents, num_experts)
        if counts_DE.numel():
            self.tp.all_reduce(counts_DE, CALL_SITE)
        of_members = self._from_rings([counts_DE[index] for index in range(num_documents)], lambda *_: (num_experts,))
        for index, came in of_members.items():
            counts_DE[index] += torch.stack(list(came.values())).sum(0)
        return counts_DE

    def choices(self, chosen_tK: Tensor) -> WholeDocuments:
        """What all tokens of the documents chose. Collective; a token costs 4 K bytes on every link that it takes."""
        device, experts_per_token = chosen_tK.device, chosen_tK.shape[1]
        own_TK = chosen_tK.new_empty(self.num_own_tokens * self.tp.size, experts_per_token, dtype=torch.int32)
        if own_TK.numel():
            self.tp.all_gather(own_TK, chosen_tK.to(torch.int32).contiguous(), CALL_SITE)
        pieces = self.micro_batch.pieces
        own = list(own_TK[: self.micro_batch.num_tokens].split([piece.num_tokens for piece in pieces]))

        def shape_of(piece: Piece, member: int) -> tuple[int, int]:
            share = share_of(self.lengths[piece.sequence], len(piece.ring), member)
            return share.num_tokens, experts_per_token

        parts = [(index, piece.ranges, own[index]) for index, piece in enumerate(pieces)]
        for index, came in self._from_rings(own, shape_of).items():
            length, size = self.lengths[pieces[index].sequence], len(pieces[index].ring)
            parts += [(index, share_of(length, size, member).ranges(), part) for member, part in came.items()]
        empty = torch.empty(0, dtype=torch.int64)
        documents = [torch.full((part.shape[0],), index) for index, _, part in parts]
        positions = [torch.arange(start, stop) for _, ranges, _ in parts for start, stop in ranges]
        chosen = [own_TK[:0], *(part for _, _, part in parts)]
        return WholeDocuments(
            torch.cat([empty, *documents]).to(device),
            torch.cat([empty, *positions]).to(device),
            torch.cat(chosen).long(),
        )

    def own_part(self, of_tokens: Tensor, padding: int) -> Tensor:
        """[t, ...]: what belongs to the tokens of this rank, of something that begins with all of this HDP rank."""
        own = of_tokens[: self.micro_batch.num_tokens]
        first = self.tp.rank * self.num_own_tokens
        own = own[first : first + self.num_own_tokens]
        missing = self.num_own_tokens - own.shape[0]
        return torch.cat([own, own.new_full((missing, *own.shape[1:]), padding)])

    def keys(self, whole: WholeDocuments, layer: int) -> Tensor:
        """[N]: a random number for every token, from seed, step, document, position and layer alone.

        In one document they are all different: the last step is a bijection of the position.
        """
        bases = torch.tensor([*self._bases(layer), 0], device=whole.positions_N.device)
        return _mixed(bases[whole.documents_N] + whole.positions_N)

    def _bases(self, layer: int) -> list[int]:
        return [
            _hashed(self.seed, self.step, self.identities[piece.sequence], layer) for piece in self.micro_batch.pieces
        ]

    def _from_rings(
        self, own: Sequence[Tensor], shape_of: Callable[[Piece, int], tuple[int, ...]]
    ) -> dict[int, dict[int, Tensor]]:
        """By document on a ring, by other member: its tensor for the one that ``own`` holds here. Collective."""
        sends, receives, came = [], [], {}
        for index, piece in enumerate(self.micro_batch.pieces):
            if len(piece.ring) == 1:
                continue
            others = {member: rank for member, rank in enumerate(piece.ring) if rank != self.hdp.rank}
            came[index] = {member: own[index].new_empty(shape_of(piece, member)) for member in others}
            sends += [(own[index].contiguous(), rank) for rank in others.values() if own[index].numel()]
            receives += [(came[index][member], rank) for member, rank in others.items() if came[index][member].numel()]
        if sends or receives:
            for work in self.hdp.exchange(sends, receives, CALL_SITE):
                work.wait()
        return came


def _hashed(seed: int, step: int, identity: str, layer: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{step}:{layer}:{identity}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mixed(x_N: Tensor) -> Tensor:
    """A bijection of 64-bit integers that scatters neighbours; int64 wraps around."""
    for shift, factor in _SHIFTS_AND_FACTORS:
        x_N = (x_N ^ _shifted(x_N, shift)) * (factor - (1 << 64))
    return x_N ^ _shifted(x_N, 31)


def _shifted(x_N: Tensor, bits: int) -> Tensor:
    """Shift to the right that fills with zeros; torch's own repeats the sign."""
    return (x_N >> bits) & ((1 << (64 - bits)) - 1)

"""Which heads of attention each of some neighbours computes; imports no torch.

Neighbours that divide heads (Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509) each compute a run of the query heads, for
the tokens of all of them, and need the key and value heads that these queries belong to. With fewer key and value heads
than neighbours, several of them need the same one: each gets a copy, and its gradients are added up.
"""

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout import Layout


def heads_of(heads: int, ways: int, index: int) -> slice:
    """The heads that neighbour ``index`` of ``ways`` needs; one of ``heads`` and ``ways`` divides the other."""
    assert heads % ways == 0 or ways % heads == 0, f"{heads} heads are not divided {ways} ways"
    first = index * heads // ways
    return slice(first, first + max(1, heads // ways))


def check_heads(layout: Layout, heads: int, kv_heads: int) -> None:
    """Return if every number of neighbours that a plan for ``layout`` may name can divide these heads.

    Args:
        layout: plans let any divisor of ``layout.ulysses`` neighbours divide the heads of a rank.
        heads: query heads of the model; where ``layout.tp`` does not divide them, that is somebody else's to refuse.
        kv_heads: key and value heads, likewise.

    Raises:
        LayoutDoesNotFit: names the number that cannot, and the degrees that can.
    """
    if heads % layout.tp or kv_heads % layout.tp:
        return
    of_rank, kv_of_rank = heads // layout.tp, kv_heads // layout.tp
    fitting = [ways for ways in range(1, of_rank + 1) if not _misfits(of_rank, kv_of_rank, ways)]
    misfits = _misfits(of_rank, kv_of_rank, layout.ulysses)
    if misfits:
        raise LayoutDoesNotFit(
            f"layout.ulysses is {layout.ulysses}, but {misfits[0]} neighbours cannot divide the {of_rank} query heads and "
            f"{kv_of_rank} key and value heads of a rank (of {heads} and {kv_heads}, layout.tp is {layout.tp}): each "
            "computes as many query heads, of whole groups or inside one. Set layout.ulysses to "
            f"{' or '.join(map(str, fitting))}.",
            axis="ulysses",
        )


def _misfits(heads: int, kv_heads: int, most: int) -> list[int]:
    """The divisors of ``most`` that cannot divide these heads."""
    return [
        ways
        for ways in range(1, most + 1)
        if most % ways == 0 and (heads % ways or (kv_heads % ways and ways % kv_heads))
    ]


__all__ = ["check_heads", "heads_of"]

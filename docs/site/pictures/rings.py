"""How a document is cut among the members of a ring."""

from docs.site.pictures.drawing import COLOURS, INK, bare, box, figure, png, title
from evermesh.parallelism.pieces import share_of

_LENGTH, _MEMBERS = 64, 4


def ring() -> bytes:
    """Tokens of every member, and the (query, key) pairs that it computes under a causal mask."""
    import numpy as np

    made, (tokens, pairs) = figure(10, 4.2, 2)
    shares = [share_of(_LENGTH, _MEMBERS, member) for member in range(_MEMBERS)]
    for member, share in enumerate(shares):
        for start, stop in share.ranges():
            box(tokens, start, 0, stop - start, 1, COLOURS[member], f"rank {member}")
        tokens.text(0, -0.45 - 0.32 * member, f"rank {member}: {share.num_tokens} tokens, {share.num_pairs():,} pairs",
                    fontsize=9.5, color=COLOURS[member], fontweight="bold", family="monospace")  # fmt: skip
    tokens.set_xlim(0, _LENGTH)
    tokens.set_ylim(-1.8, 1.6)
    bare(tokens)
    title(tokens, f"a document of {_LENGTH} tokens: a head and a tail for each")

    image = np.ones((_LENGTH, _LENGTH, 3))
    for member, share in enumerate(shares):
        colour = [int(COLOURS[member][at : at + 2], 16) / 255 for at in (1, 3, 5)]
        for start, stop in share.ranges():
            for query in range(start, stop):
                image[query, : query + 1] = colour
    pairs.imshow(image, interpolation="nearest")
    pairs.set_xlabel("key", color=INK)
    pairs.set_ylabel("query", color=INK)
    pairs.set_xticks([])
    pairs.set_yticks([])
    pairs.spines[:].set_visible(False)
    title(pairs, "who computes which pair: all equally many")
    return png(made)

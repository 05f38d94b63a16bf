"""The rules of a set against what each of its ranks owns, on any mesh, tiers and cuts."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.checkpoint.regions import Region
from evermesh.checkpoint.shard_map import TensorShards
from evermesh.parallelism.experts import GridCut
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.tensor import Cut
from evermesh.parallelism.tiers import Division
from evermesh.runtime.flat import AnyCut, FlatLayout, HeldSet


@st.composite
def divisions(draw: st.DrawFn, ranks: int) -> Division:
    degrees = [1]
    for _ in range(3):
        degrees.append(
            draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0 and n % degrees[-1] == 0]))
        )
    return Division(ranks, *degrees[1:])


@st.composite
def sets(draw: st.DrawFn) -> HeldSet:
    ep, etp = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    tp = draw(st.integers(1, 4))
    hdp = draw(st.integers(1, 4)) * ep * etp // math.gcd(tp, ep * etp)
    mesh, pp = Mesh(hdp, tp, 2, ep, etp), draw(st.integers(0, 1))
    cuts: dict[str, AnyCut] = {}
    is_of_experts = draw(st.booleans())
    for index in range(draw(st.integers(1, 4))):
        if is_of_experts:
            shape = (ep * draw(st.integers(1, 2)), draw(st.integers(1, 4)), etp * draw(st.integers(1, 3)))
            cuts[f"t{index}"] = GridCut(shape, ((0, ep), (2, etp)))
        else:
            of_any = tuple(draw(st.lists(st.integers(tp, 3 * tp), min_size=1, max_size=2)))
            dim = draw(st.sampled_from([None, *range(len(of_any))])) if tp > 1 else None
            cuts[f"t{index}"] = Cut(of_any, dim, tp)
    holders = mesh.expert_holders(pp) if is_of_experts else mesh.holders(pp)
    return HeldSet(FlatLayout(cuts, draw(divisions(len(holders)))), holders)


@settings(max_examples=150, deadline=None)
@given(sets())
def test_every_rank_holds_by_the_rules_what_it_owns_of_the_set(held: HeldSet) -> None:
    layout = held.layout
    tensors = {entry.name: TensorShards("float32", entry.cut.shape, rule) for entry, rule in held.rules()}
    for tensor in tensors.values():
        tensor.check()
        TensorShards("float32", tensor.shape, tensor.shards).check()
    for owner, sharers in enumerate(held.holders):
        for sharer, rank in enumerate(sharers):
            owned: dict[str, tuple[Region, ...]] = dict.fromkeys(tensors, ())
            for part in layout.owned_parts(owner):
                owned[part.entry.name] = part.entry.regions(sharer, part.start, part.stop)
            assert {name: tensor.of_rank(rank) for name, tensor in tensors.items()} == owned
    outside = held.holders[-1][-1] + 1
    assert not any(tensor.of_rank(outside) for tensor in tensors.values())

"""How ranks are numbered: every rank in one group of every axis, on the attention side and on the expert side."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evermesh.parallelism import Layout
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.mesh import Axis, Mesh

DEGREES = st.integers(1, 4)


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    hdp, tp = draw(DEGREES), draw(DEGREES)
    ep = draw(st.sampled_from([n for n in range(1, hdp * tp + 1) if hdp * tp % n == 0]))
    etp = draw(st.sampled_from([n for n in range(1, hdp * tp // ep + 1) if hdp * tp // ep % n == 0]))
    return Mesh(hdp=hdp, tp=tp, pp=draw(DEGREES), ep=ep, etp=etp)


@given(mesh=meshes())
def test_groups_of_an_axis_are_the_ranks_that_differ_in_its_coordinate_only(mesh: Mesh) -> None:
    axes: tuple[tuple[Axis, ...], ...] = (("pp", "hdp", "tp"), ("pp", "edp", "ep", "etp"))
    for side in axes:
        for axis in side:
            groups = mesh.groups(axis)
            assert sorted(itertools.chain(*groups)) == list(range(mesh.size))
            for group in groups:
                places = [_place(mesh, rank, side) for rank in group]
                assert [place.pop(axis) for place in places] == list(range(len(group)))
                assert all(place == places[0] for place in places)


def _place(mesh: Mesh, rank: int, side: tuple[Axis, ...]) -> dict[str, int]:
    found = mesh.coordinates(rank) if "tp" in side else mesh.expert_coordinates(rank)
    return dict(zip(side, found, strict=True))


@given(mesh=meshes())
def test_ranks_and_coordinates_are_each_others_inverse(mesh: Mesh) -> None:
    for rank in range(mesh.size):
        place = mesh.coordinates(rank)
        assert mesh.rank(place.hdp, place.tp, place.pp) == rank
        assert mesh.holders(place.pp)[place.hdp][place.tp] == rank
        expert = mesh.expert_coordinates(rank)
        assert expert.pp == place.pp, "only the pipeline is common to both sides"
        assert mesh.expert_holders(expert.pp)[expert.edp][expert.ep * mesh.etp + expert.etp] == rank


def test_experts_may_span_more_ranks_than_hold_a_sequence_or_a_model() -> None:
    mesh = Mesh(hdp=16, tp=4, pp=4, ep=64)  # the published example: TP 4, CP 2, DP 8, PP 4, EP 64
    assert mesh.groups("ep")[1] == tuple(range(64, 128))
    assert mesh.edp == 1


def test_expert_degrees_that_do_not_divide_a_stage_are_refused() -> None:
    with pytest.raises(
        LayoutDoesNotFit, match=r"ep 4 x etp 2 = 8 ranks .* do not divide the hdp 3 x tp 2 = 6 .* can be 1, 2, 3, 6\."
    ):
        Mesh.of(Layout(hdp=3, tp=2, ep=4, etp=2))

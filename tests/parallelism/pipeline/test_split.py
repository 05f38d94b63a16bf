"""The split of layers into stages against every split there is."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.pipeline import split_layers


def _slowest(stages: tuple[range, ...], layer_s: list[int], ends_s: tuple[int, int], speeds: list[int]) -> float:
    """``ends_s``: of embedding and head."""
    seconds = [sum(layer_s[layer] for layer in stage) for stage in stages]
    seconds[0] += ends_s[0]
    seconds[-1] += ends_s[1]
    return max(work / speed for work, speed in zip(seconds, speeds, strict=True))


@given(
    layer_s=st.lists(st.integers(0, 20), min_size=1, max_size=9),
    embedding_s=st.integers(0, 30),
    head_s=st.integers(0, 30),
    choice=st.integers(0, 8),
    speeds=st.one_of(st.just([1] * 9), st.lists(st.integers(1, 8), min_size=9, max_size=9)),
)
def test_no_other_split_has_a_faster_slowest_stage(
    layer_s: list[int], embedding_s: int, head_s: int, choice: int, speeds: list[int]
) -> None:
    layers = len(layer_s)
    num_stages = 1 + choice % layers
    splits = [
        tuple(range(start, stop) for start, stop in itertools.pairwise((0, *cuts, layers)))
        for cuts in itertools.combinations(range(1, layers), num_stages - 1)
    ]
    of_stages = speeds[:num_stages]
    ours = split_layers(layer_s, num_stages, embedding_s=embedding_s, head_s=head_s, speeds=of_stages)
    assert ours in splits
    assert _slowest(ours, layer_s, (embedding_s, head_s), of_stages) == min(
        _slowest(split, layer_s, (embedding_s, head_s), of_stages) for split in splits
    )


def test_the_first_stages_get_fewer_layers_where_there_is_a_choice() -> None:
    assert split_layers([1.0] * 6, 4) == (range(1), range(1, 2), range(2, 4), range(4, 6))


def test_a_heavy_head_leaves_fewer_layers_to_the_last_stage() -> None:
    assert split_layers([1.0] * 8, 2, head_s=2.0) == (range(5), range(5, 8))


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(LayoutDoesNotFit, match="4 pipeline stages, but the model has 3 layers"):
        split_layers([1.0] * 3, 4)

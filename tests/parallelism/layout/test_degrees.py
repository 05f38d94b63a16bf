"""What a layout says of itself, and what it refuses."""

import pytest

from evermesh.parallelism import Layout
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.tiers import Tiers


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (Layout(hdp=4), ()),
        (Layout(hdp=4, tp=2, ep=2), ()),
        (Layout(hdp=4, ep=2), ((0, 1), (2, 3))),
        (Layout(hdp=4, tp=2, ep=2, etp=2), ((0, 1), (2, 3))),
        (Layout(hdp=4, tp=2, ep=8), ((0, 1, 2, 3),)),
        (Layout(hdp=3, tp=4, ep=6), ((0, 1, 2),)),
        (Layout(hdp=4, tp=3, ep=2), ((0, 1), (2, 3))),
        (Layout(hdp=4, sharding=Tiers(parameters=2, gradients=2)), ()),
        (Layout(hdp=4, sharding=Tiers(states=2, keep_for="micro_batch")), ()),
        (Layout(hdp=4, sharding=Tiers(parameters=2, gradients=2, keep_for="micro_batch")), ((0, 1), (2, 3))),
        (Layout(hdp=4, sharding=Tiers(gradients="all", keep_for="micro_batch")), ((0, 1, 2, 3),)),
        # edp 4: the experts are divided among neighbours along it, ranks 0 and 2, which are both halves of two models
        (Layout(hdp=4, tp=2, ep=2, sharding=Tiers(gradients=2, keep_for="micro_batch")), ((0, 1), (2, 3))),
        (Layout(hdp=8, ep=2, sharding=Tiers(gradients=2, keep_for="micro_batch")), ((0, 1, 2, 3), (4, 5, 6, 7))),
    ],
)
def test_hdp_ranks_that_communicate_in_every_micro_batch_keep_step(
    layout: Layout, groups: tuple[tuple[int, ...], ...]
) -> None:
    assert layout.lock_step_groups == groups


def test_experts_that_do_not_divide_the_ranks_of_a_stage_are_refused() -> None:
    with pytest.raises(
        LayoutDoesNotFit, match="ep 3 x etp 1 = 3 ranks that share experts do not divide the hdp 4 x tp 1 = 4 ranks"
    ):
        _ = Layout(hdp=4, ep=3).lock_step_groups


def test_a_layout_refuses_a_schedule_that_its_virtual_stages_do_not_have() -> None:
    with pytest.raises(ValueError, match="schedule 1f1b takes 1 virtual stages per rank, not 2"):
        Layout(pp=2, virtual_stages=2)


def test_virtual_stages_without_a_pipeline_are_refused_and_its_schedule_is_the_plain_one() -> None:
    with pytest.raises(ValueError, match="2 virtual stages per rank, but pp 1"):
        Layout(schedule="interleaved-1f1b", virtual_stages=2)
    order = Layout(schedule="gpipe").pipeline.actions(0, 2)
    assert [(action.kind, action.micro_batch) for action in order] == [
        ("forward", 0),
        ("backward", 0),
        ("forward", 1),
        ("backward", 1),
    ]

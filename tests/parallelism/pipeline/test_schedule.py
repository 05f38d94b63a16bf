"""The order of a pipeline: complete, free of waiting in a circle, the same for every number of micro-batches, torch's own."""

import itertools
from collections import Counter
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.pipeline import Action, Message, PipelineSchedule, ScheduleName, peak_activations

VIRTUAL_STAGES: dict[ScheduleName, tuple[int, ...]] = {
    "gpipe": (1,),
    "1f1b": (1,),
    "interleaved-1f1b": (2, 3),
    "zero-bubble": (1, 2, 3),
    "zero-bubble-v": (2,),
}
SCHEDULES = [
    PipelineSchedule(name, ranks, virtual_stages)
    for name, choices in VIRTUAL_STAGES.items()
    for ranks in (1, 2, 3, 4)
    for virtual_stages in choices
]
MOST = 20


def _name(schedule: PipelineSchedule) -> str:
    return f"{schedule.name}-{schedule.ranks}x{schedule.virtual_stages}"


all_schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=_name)


def _orders(schedule: PipelineSchedule, num_micro_batches: int) -> list[tuple[Action, ...]]:
    return [schedule.actions(rank, num_micro_batches) for rank in range(schedule.ranks)]


@all_schedules
def test_every_stage_runs_every_micro_batch_once_forward_and_once_backward(schedule: PipelineSchedule) -> None:
    for number in range(MOST + 1):
        for rank, order in enumerate(_orders(schedule, number)):
            parts = ("backward input", "backward weight") if schedule.splits_backward else ("backward",)
            expected = itertools.product(("forward", *parts), schedule.stages_of(rank), range(number))
            assert Counter(order) == Counter(itertools.starmap(Action, expected))


def _run_with_blocking_receives(schedule: PipelineSchedule, num_micro_batches: int) -> None:
    """Every rank goes on until its next action needs what nobody has sent yet; sending never waits."""
    orders = [list(order) for order in _orders(schedule, num_micro_batches)]
    sent: set[Message] = set()
    done: set[Action] = set()
    progress = True
    while progress:
        progress = False
        for order in orders:
            while order:
                action = order[0]
                message = schedule.received(action)
                if message is not None and message not in sent:
                    break
                needed = {
                    "forward": [],
                    "backward": [Action("forward", action.stage, action.micro_batch)],
                    "backward input": [Action("forward", action.stage, action.micro_batch)],
                    "backward weight": [Action("backward input", action.stage, action.micro_batch)],
                }[action.kind]
                assert done.issuperset(needed), f"{action} before {needed}"
                done.add(order.pop(0))
                handed_on = schedule.sent(action)
                if handed_on is not None:
                    assert handed_on not in sent
                    sent.add(handed_on)
                progress = True
    assert not any(orders), f"stuck at {[order[0] for order in orders if order]}"


@all_schedules
def test_no_rank_waits_for_ever(schedule: PipelineSchedule) -> None:
    for number in range(MOST + 1):
        _run_with_blocking_receives(schedule, number)


@all_schedules
def test_fewer_micro_batches_run_in_the_order_of_more(schedule: PipelineSchedule) -> None:
    def that_communicate(order: tuple[Action, ...], number: int) -> list[Action]:
        return [a for a in order if a.micro_batch < number and a.kind != "backward weight"]

    longest = _orders(schedule, MOST)
    for number in range(MOST):
        for rank, order in enumerate(_orders(schedule, number)):
            assert that_communicate(order, number) == that_communicate(longest[rank], number)


@all_schedules
def test_a_rank_keeps_as_many_activations_as_the_papers_say(schedule: PipelineSchedule) -> None:
    ranks, stages, number = schedule.ranks, schedule.virtual_stages, 4 * schedule.ranks
    for rank in range(ranks):
        expected = {
            "gpipe": number,
            "1f1b": ranks - rank,
            "interleaved-1f1b": min((stages - 1) * ranks + 2 * (ranks - 1 - rank) + 1, number * stages),
            "zero-bubble": stages * ranks,
            "zero-bubble-v": stages * ranks,
        }[schedule.name]
        assert peak_activations(schedule.actions(rank, number)) == expected


class _Stage:
    """As much of a stage as torch's schedules ask for when they make their order."""

    def __init__(self, index: int, ranks: int, rank: int, num_stages: int) -> None:
        self.stage_index, self.group_size, self.group_rank, self.num_stages = index, ranks, rank, num_stages
        self.has_backward, self.is_first, self.is_last = True, index == 0, index == num_stages - 1
        self.group, self.device, self.submod = None, "cpu", None
        self.stage_index_to_group_rank: dict[int, int] = {}


TORCH: dict[str, Any] = {
    "interleaved-1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "zero-bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zero-bubble-v": torch_schedules.ScheduleZBVZeroBubble,
}


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.name in TORCH], ids=_name)
def test_the_order_is_the_one_that_torch_itself_prepares(schedule: PipelineSchedule) -> None:
    for number in range(schedule.ranks, MOST + 1, schedule.ranks):
        stages: list[Any] = [_Stage(index, schedule.ranks, 0, schedule.num_stages) for index in schedule.stages_of(0)]
        theirs = TORCH[schedule.name](stages, number, loss_fn=lambda *_: None)
        for rank, order in enumerate(_orders(schedule, number)):
            letters = [(a.kind.split()[-1][0].upper(), a.stage, a.micro_batch) for a in order]
            expected = [
                (a.computation_type.value, a.stage_index, a.microbatch_index)
                for a in theirs.pipeline_order[rank]
                if a is not None and a.computation_type.value in "FBIW"
            ]
            assert letters == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_1f1b_is_what_torch_makes_of_one_stage_and_this_warm_up(ranks: int) -> None:
    for number, rank in itertools.product(range(MOST + 1), range(ranks)):
        warm_up = min(ranks - 1 - rank, number)
        theirs: list[Any] = torch_schedules._get_1f1b_rank_ops(
            1, ranks, warm_up, number - warm_up, warm_up, rank, lambda _, rank=rank: rank, lambda _, rank=rank: rank
        )
        expected = [(a.computation_type.value, a.microbatch_index) for a in theirs if a is not None]
        order = PipelineSchedule("1f1b", ranks).actions(rank, number)
        assert [(action.kind[0].upper(), action.micro_batch) for action in order] == expected


def test_stages_go_round_in_a_loop_or_come_back_in_a_v() -> None:
    loop, v = PipelineSchedule("interleaved-1f1b", 3, 2), PipelineSchedule("zero-bubble-v", 3, 2)
    assert [loop.stages_of(rank) for rank in range(3)] == [(0, 3), (1, 4), (2, 5)]
    assert [v.stages_of(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert loop.links() == ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))
    assert v.links() == ((0, 1), (1, 0), (1, 2), (2, 1))


@pytest.mark.parametrize(
    ("name", "virtual_stages", "message"),
    [
        ("1f1b", 2, "1f1b takes 1 virtual stages per rank, not 2"),
        ("interleaved-1f1b", 1, "takes at least 2 virtual stages"),
        ("zero-bubble-v", 3, "takes 2 virtual stages"),
    ],
)
def test_a_schedule_refuses_virtual_stages_that_it_has_no_order_for(
    name: ScheduleName, virtual_stages: int, message: str
) -> None:
    with pytest.raises(LayoutDoesNotFit, match=message):
        PipelineSchedule(name, 2, virtual_stages)

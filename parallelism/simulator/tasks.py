"""A batch plan as tasks: what every rank does in which order, and what has to run together or before."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pipeline.schedule import Action, ActionKind


@dataclass(slots=True)
class Task:
    """One micro-batch, or one action of it in one stage, on one rank."""

    micro_batch: MicroBatch
    index: int
    """Of the micro-batch in the list of its HDP rank."""
    gang: int
    kind: ActionKind | None = None
    """None: forward and backward at once."""
    sends_to: int | None = None
    """The gang that waits for a message of this task."""
    receives_from: int | None = None
    """The rank whose message it waits for."""


@dataclass(slots=True)
class Program:
    """The tasks of every rank. Ranks are numbered HDP rank by HDP rank, with the stages of each together."""

    pp: int
    stages: int
    in_lock_step: bool
    """Whether some tasks are joined by something else than rings."""
    ranks: list[list[Task]] = field(default_factory=list)
    gangs: list[list[int]] = field(default_factory=list)
    """Ranks that run a task together, ascending."""

    def hdp_rank(self, rank: int) -> int:
        """The HDP rank that ``rank`` is a stage of."""
        return rank // self.pp

    def labels(self) -> tuple[str, ...]:
        """What the ranks are called."""
        if self.pp == 1:
            return tuple(f"rank {rank}" for rank in range(len(self.ranks)))
        return tuple(f"rank {rank // self.pp} pp {rank % self.pp}" for rank in range(len(self.ranks)))


Ranks = Sequence[Sequence[MicroBatch]]


def program_of(plan: BatchPlan, layout: Layout) -> Program:
    """The tasks of ``plan``; ``layout`` says the pipeline and what else than rings joins ranks.

    Raises:
        PlanInvalid: a member of a ring does not have the sequence.
    """
    groups, ranks = layout.lock_step_groups, tuple(plan.ranks)
    components = _joined(ranks, groups)
    program = Program(layout.pp, layout.pipeline.num_stages, bool(groups))
    if layout.pp > 1 or groups:
        _add_actions(program, ranks, layout, components)
    else:
        _add_micro_batches(program, ranks, components)
    return program


def _add_micro_batches(program: Program, ranks: Ranks, components: list[list[int]]) -> None:
    gang_of: dict[int, int] = {}
    for rank, micro_batches in enumerate(ranks):
        program.ranks.append([])
        for index, micro_batch in enumerate(micro_batches):
            gang = gang_of.setdefault(components[rank][index], len(gang_of))
            if gang == len(program.gangs):
                program.gangs.append([])
            program.gangs[gang].append(rank)
            program.ranks[-1].append(Task(micro_batch, index, gang))


def _add_actions(program: Program, ranks: Ranks, layout: Layout, components: list[list[int]]) -> None:
    schedule = layout.pipeline
    gang_of: dict[tuple[int, Action] | tuple[int, int, Action], int] = {}
    places: dict[tuple[int, Action], int] = {}
    for hdp_rank, micro_batches in enumerate(ranks):
        for pipeline_rank in range(layout.pp):
            program.ranks.append([])
            for action in schedule.actions(pipeline_rank, len(micro_batches)):
                component = components[hdp_rank][action.micro_batch]
                # gradients of weights need nobody else
                alone = action.kind == "backward weight"
                gang = gang_of.setdefault((hdp_rank, 0, action) if alone else (component, action), len(gang_of))
                if gang == len(program.gangs):
                    program.gangs.append([])
                program.gangs[gang].append(len(program.ranks) - 1)
                places[hdp_rank, action] = gang
                task = Task(micro_batches[action.micro_batch], action.micro_batch, gang, action.kind)
                message = schedule.received(action)
                if message is not None:
                    task.receives_from = hdp_rank * layout.pp + schedule.sender(message)
                program.ranks[-1].append(task)
    receivers = {
        (hdp_rank, message): gang
        for (hdp_rank, action), gang in places.items()
        if (message := schedule.received(action)) is not None
    }
    for rank, tasks in enumerate(program.ranks):
        hdp_rank, pipeline_rank = divmod(rank, layout.pp)
        actions = schedule.actions(pipeline_rank, len(ranks[hdp_rank]))
        for task, action in zip(tasks, actions, strict=True):
            message = schedule.sent(action)
            task.sends_to = None if message is None else receivers[hdp_rank, message]


def _joined(ranks: Ranks, groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """By rank and micro-batch, the number of the set of micro-batches that run together, directly or through others."""
    numbers: list[range] = []
    for micro_batches in ranks:
        first = numbers[-1].stop if numbers else 0
        numbers.append(range(first, first + len(micro_batches)))
    parents = list(range(numbers[-1].stop if numbers else 0))
    holders: dict[int, list[int]] = {}
    """By sequence, the numbers of the micro-batches with a piece of it."""
    rings: dict[int, int] = {}
    for rank, micro_batches in enumerate(ranks):
        for number, micro_batch in zip(numbers[rank], micro_batches, strict=True):
            for piece in micro_batch.pieces:
                if len(piece.ring) > 1:
                    holders.setdefault(piece.sequence, []).append(number)
                    rings[piece.sequence] = len(piece.ring)
    for sequence, held in holders.items():
        if len(held) != rings[sequence]:
            raise PlanInvalid(
                f"the ring of sequence {sequence} has {rings[sequence]} ranks, but {len(held)} micro-batches hold it."
            )
    for together in (*holders.values(), *_in_lock_step(numbers, groups)):
        for number in together[1:]:
            parents[_root(parents, number)] = _root(parents, together[0])
    return [[_root(parents, number) for number in of_rank] for of_rank in numbers]


def _in_lock_step(numbers: Sequence[range], groups: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The micro-batches of one index on the ranks of a group that have so many."""
    for group in groups:
        for index in range(max(len(numbers[rank]) for rank in group)):
            yield [numbers[rank][index] for rank in group if index < len(numbers[rank])]


def _root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number

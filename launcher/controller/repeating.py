"""What an agent is told again when it is connected, for it may have missed it. A pure function."""

from collections.abc import Iterator

from evermesh.launcher.controller.life import Life
from evermesh.launcher.controller.status import ENDED, JobState
from evermesh.launcher.messages import Ask, End, Hello, Leave, OpenStore, ToAgent


def repeated_orders(
    state: JobState, generation: int, life: Life | None, hello: Hello, saved: int | None
) -> Iterator[tuple[str, ToAgent]]:
    """Orders to nodes, by name: to the one that said hello, or to that of the rendezvous. ``saved``: step of the newest
    checkpoint."""
    name, told = hello.node, hello.outcome
    if state in ENDED:
        yield name, Leave()
    if told is not None and not told.is_over and told.generation != generation:
        yield name, End(generation=told.generation)  # it was cut off while the others went on without it
    if life is None or name not in life.nodes:
        return
    has_ranks = told is not None and told.generation == generation
    if state == "starting" and not has_ranks:
        yield life.nodes[0], OpenStore(generation=generation)
    elif life.is_ending:
        yield name, End(generation=generation)
    elif state == "stopping":
        yield name, Ask(generation=generation, what="stop")
    elif state == "regrouping":
        yield name, Ask(generation=generation, what="regroup")
    elif life.saving_behind is not None and (saved is None or saved < life.saving_behind):
        yield name, Ask(generation=generation, what="save")

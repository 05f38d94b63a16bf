"""On how many nodes a job can go on that has lost some, and in which layouts. Batches stay as they are."""

import itertools
from collections.abc import Iterator

from evermesh.launcher.config import JobConfig
from evermesh.parallelism.errors import EvermeshError
from evermesh.parallelism.layout import Layout
from evermesh.runtime.layout import check_layout


def node_counts(config: JobConfig) -> tuple[int, ...]:
    """The numbers of nodes that the job may run on, most first: from ``nodes`` down to ``min_nodes``, as far as the trainer
    has a layout for their workers."""
    least, per_node = config.min_nodes or config.nodes, config.workers // config.nodes
    fewer = range(config.nodes - 1, least - 1, -1)
    return (config.nodes, *(count for count in fewer if any(_layouts(config, count * per_node))))


def layouts_on(config: JobConfig, workers: int) -> tuple[Layout, ...]:
    """The layouts of the job on so many workers; on as many as it asks for, its own.

    As it is with fewer HDP ranks comes first, if that divides the workers; then smaller model replicas, the largest first,
    for they need the least memory. None makes a micro-batch larger than it was, or has no room for the longest sequence, or
    is one that the trainer cannot run.
    """
    return tuple(_layouts(config, workers))


def _layouts(config: JobConfig, workers: int) -> Iterator[Layout]:
    given = config.train.layout
    if given.world_size == workers:
        yield given
        return
    degrees = itertools.product(range(1, given.pp + 1), range(1, given.tp + 1))
    in_order = sorted(degrees, key=lambda one: (-one[0] * one[1], -one[1]))
    yield from filter(None, (_layout_of(config, workers, pp, tp) for pp, tp in in_order))


def _layout_of(config: JobConfig, workers: int, pp: int, tp: int) -> Layout | None:
    given = config.train.layout
    hdp, rest = divmod(workers, pp * tp)
    if rest or given.capacity * hdp < config.train.data.context:  # the longest sequence must find room
        return None
    layout = given.model_copy(update={"pp": pp, "tp": tp, "hdp": hdp})
    try:
        layout = Layout.model_validate(layout.model_dump())
        check_layout(config.train.model_copy(update={"layout": layout}))
    except (EvermeshError, ValueError):
        return None
    return layout

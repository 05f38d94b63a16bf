"""On how many nodes a job can go on that has lost some, and in which layout. Batches stay as they are."""

import itertools

from evermesh.launcher.config import JobConfig
from evermesh.parallelism.errors import EvermeshError
from evermesh.parallelism.layout import Layout
from evermesh.runtime.layout import check_layout


def node_counts(config: JobConfig) -> tuple[int, ...]:
    """The numbers of nodes that the job may run on, most first: from ``nodes`` down to ``min_nodes``, as far as the trainer
    has a layout for their workers."""
    least, per_node = config.min_nodes or config.nodes, config.workers // config.nodes
    fewer = (
        count for count in range(config.nodes - 1, least - 1, -1) if layout_on(config, count * per_node) is not None
    )
    return (config.nodes, *fewer)


def layout_on(config: JobConfig, workers: int) -> Layout | None:
    """The layout of the job on so many workers: as it is with fewer HDP ranks, or else with as many ranks per model replica
    as divide the workers and the trainer can run. None: there is none; a micro-batch is made no larger than it was."""
    given = config.train.layout
    if given.world_size == workers:
        return given
    degrees = itertools.product(range(1, given.pp + 1), range(1, given.tp + 1))
    for pp, tp in sorted(degrees, key=lambda one: (-one[0] * one[1], -one[1])):
        hdp, rest = divmod(workers, pp * tp)
        if rest or given.capacity * hdp < config.train.data.context:  # the longest sequence must find room
            continue
        layout = given.model_copy(update={"pp": pp, "tp": tp, "hdp": hdp})
        try:
            layout = Layout.model_validate(layout.model_dump())
            check_layout(config.train.model_copy(update={"layout": layout}))
        except (EvermeshError, ValueError):
            continue
        return layout
    return None

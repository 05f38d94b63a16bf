"""``python -m evermesh.launcher.ranking RUN``: how long a step of a job takes on fewer nodes, in every layout that it can
have there.

It prints one JSON object (``Rankings``). Times are those of the formula of ``evermesh layout``, for the model, the first
batches of the data, and nominal rates of the device, or those that ``train.cost`` was measured with. Batches are not planned:
on hundreds of ranks that would take a minute for each number of nodes. It ends with the process that started it.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from evermesh.launcher.config import JobConfig
from evermesh.launcher.death import end_with_parent
from evermesh.launcher.elastic import layouts_on, node_counts
from evermesh.launcher.run_directory import Run
from evermesh.parallelism.errors import EvermeshError
from evermesh.parallelism.layout import Layout

if TYPE_CHECKING:
    from evermesh.parallelism.cost import ModelShape
    from evermesh.parallelism.layout.device import Device

_NICENESS = 10
"""Behind what trains on this machine."""


class Expected(BaseModel):
    """A layout, and how long a step is expected to take in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Layout
    step_s: float


class Ranking(BaseModel):
    """The layouts on so many workers that fit into memory, the fastest first; without one, none is known to fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int
    fastest: tuple[Expected, ...]
    seconds: float
    """That it took to rank them."""


class Rankings(BaseModel):
    """By number of nodes, most first, where there is a choice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rankings: tuple[Ranking, ...] = ()
    problem: str = ""
    """Why there are none."""


def may_choose(config: JobConfig) -> bool:
    """Whether there may be several layouts for some number of workers on fewer nodes."""
    given = config.train.layout
    return config.nodes > (config.min_nodes or config.nodes) and given.pp * given.tp > 1


def choices(config: JobConfig) -> dict[int, tuple[Layout, ...]]:
    """By number of workers on fewer nodes: the layouts that the job can have there, where they are several."""
    per_node = config.workers // config.nodes
    found = {count * per_node: layouts_on(config, count * per_node) for count in node_counts(config)[1:]}
    return {workers: layouts for workers, layouts in found.items() if len(layouts) > 1}


def rank(config: JobConfig, layouts: Sequence[Layout], lengths: Sequence[Sequence[int]], vocabulary: int) -> Ranking:
    """These layouts on as many workers as they have, by the mean time of a step with batches of these ``lengths``.

    Equals stay in the order in which they were given. ``vocabulary`` is what the tokenizer has.
    """
    from evermesh.parallelism.layout.network import Network
    from evermesh.parallelism.layout.options import SearchOptions
    from evermesh.parallelism.layout.ranked import Judge
    from evermesh.runtime.cost import ELEMENT_BYTES

    began_s, train = time.perf_counter(), config.train
    workers, per_node = layouts[0].world_size, config.workers // config.nodes
    shape = train.model.shape(vocabulary)
    options = SearchOptions(device=_device(config, shape), element_bytes=ELEMENT_BYTES[train.dtype])
    judge = Judge(shape, lengths, options)
    network = Network(options.device.topology(workers // per_node, per_node))
    found = [judge.at_once(layout, network) for layout in layouts]
    fitting = [one for one in found if one.largest_capacity >= one.layout.capacity]
    fastest = sorted(fitting, key=lambda one: one.step.total)
    expected = tuple(Expected(layout=one.layout, step_s=one.step.total) for one in fastest)
    return Ranking(workers=workers, fastest=expected, seconds=time.perf_counter() - began_s)


def _device(config: JobConfig, shape: "ModelShape") -> "Device":
    """What a rank computes with, at the rates that ``train.cost`` says of the layout of the job, if it says any."""
    from evermesh.parallelism.layout.activations import Precision
    from evermesh.parallelism.layout.network import Network
    from evermesh.parallelism.layout.rates import Hardware, rates
    from evermesh.runtime.advice import device_of
    from evermesh.runtime.cost import ELEMENT_BYTES

    train, nominal = config.train, device_of(config.train)
    if train.cost is None:
        return nominal
    network = Network(nominal.topology(config.nodes, config.workers // config.nodes))
    hardware = Hardware(network, nominal, Precision(ELEMENT_BYTES[train.dtype], nominal.fused_norms))
    expected, measured = rates(shape, train.layout, hardware).cost_model(), train.cost
    measured_rates = {
        "flops_per_s": nominal.flops_per_s * expected.token_s / measured.token_s,
        "layer_s": nominal.layer_s * measured.micro_batch_s / expected.micro_batch_s,
    }
    if measured.pair_s:
        measured_rates["attention_flops_per_s"] = nominal.attention_flops_per_s * expected.pair_s / measured.pair_s
    return nominal.model_copy(update=measured_rates)


def rank_all(path: Path, config: JobConfig) -> Rankings:
    """All choices of the job that the file at ``path`` describes, by its data."""
    from rich.console import Console

    from evermesh.launcher.layouts import LengthsAsked, Source

    source = Source(path, config.train.model, config)
    try:
        lengths, vocabulary = source.lengths(LengthsAsked(), Console(stderr=True))
        found = [rank(config, layouts, lengths, vocabulary) for layouts in choices(config).values()]
    except (EvermeshError, OSError) as error:
        return Rankings(problem=str(error))
    return Rankings(rankings=tuple(found))


if __name__ == "__main__":
    end_with_parent()
    os.nice(_NICENESS)
    run = Run(Path(sys.argv[1]))
    print(rank_all(run.directory / "job.yaml", run.config()).model_dump_json())

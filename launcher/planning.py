"""Plans one batch outside training: of a job's own data, or of a list of lengths."""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from evermesh.launcher.config import JobConfig
from evermesh.launcher.corpora import open_corpora
from evermesh.launcher.errors import LengthsInvalid
from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pipeline.simulator import timeline_of
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.simulator import Timeline
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.cost import nominal_cost
from evermesh.runtime.data import DataConfig, Sampler, StdlibSource

_VOCABULARY = 32_768
"""Assumed for a list of lengths, which belongs to no model."""

_MOST_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and when its micro-batches run."""

    plan: BatchPlan
    timeline: Timeline


def plan_of_job(config: JobConfig, batch: int, console: Console) -> Planned:
    """The plan of a job's batch, counted from 1, as the trainer makes it.

    Raises:
        EvermeshError: of the data, or SequenceTooLong.
    """
    corpora = open_corpora(config.train.data, console)
    sampler = Sampler(corpora, config.train.data, config.train.seed)
    for _ in range(batch - 1):
        sampler.next_batch()
    cost = config.train.cost or nominal_cost(config.train, config.train.model.shape(corpora[0].vocabulary))
    return _planned(sampler.next_batch().lengths, config.train.layout, cost)


def plan_of_lengths(path: Path, workers: int, capacity: int | None) -> Planned:
    """The plan of the sequences whose lengths are in ``path``, under the nominal cost of the default model.

    Without a capacity, ranks hold twice their share of the tokens, or what the longest sequence needs.
    """
    lengths = read_lengths(path)
    capacity = capacity or max(-(-max(lengths) // workers), -(-2 * sum(lengths) // workers))
    train = TrainConfig(data=DataConfig(sources=(StdlibSource(),)))  # only its model and device count here
    return _planned(
        lengths, Layout(hdp=workers, capacity=capacity), nominal_cost(train, train.model.shape(_VOCABULARY))
    )


def read_lengths(path: Path) -> tuple[int, ...]:
    """The lengths in a file, one per line; ``.gz`` is unpacked, empty lines and comments (#) are skipped.

    Raises:
        LengthsInvalid: names the file and the line.
    """
    try:
        lines = _text(path).splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LengthsInvalid(f"{path} cannot be read: {error}. Give a job (.yaml) or a file of lengths.") from error
    lengths = []
    for number, line in enumerate(lines, start=1):
        value = line.partition("#")[0].strip()
        if value and not (value.isdecimal() and len(value) <= _MOST_DIGITS and int(value) > 0):
            raise LengthsInvalid(
                f"{path}:{number}: {value[:40]!r} is not a length. Write one positive integer per line."
            )
        if value:
            lengths.append(int(value))
    if not lengths:
        raise LengthsInvalid(f"{path} holds no lengths. Write one positive integer per line.")
    return tuple(lengths)


def _text(path: Path) -> str:
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()


def _planned(lengths: Sequence[int], layout: Layout, cost: CostModel) -> Planned:
    plan = plan_batch(lengths, layout, cost)
    return Planned(plan, timeline_of(plan, layout, cost))

"""Plans one batch outside training: of a job's own data, of a list of lengths, or as a file says."""

import dataclasses
import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import PositiveInt, ValidationError, model_validator
from rich.console import Console

from evermesh.launcher.corpora import open_corpora
from evermesh.launcher.drawn_batches import drawn_batches
from evermesh.launcher.errors import LengthsInvalid, ScenarioInvalid
from evermesh.launcher.job_file import load_job
from evermesh.parallelism.batch_plan import BatchPlan, Certificate
from evermesh.parallelism.cost import CostModel, ModelShape
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner import bound_for, plan_batch
from evermesh.parallelism.planner.restated import RESTATED
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.simulator import Scenario, Timeline, simulate_events
from evermesh.parallelism.simulator.foreign import read_foreign
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.cost import cost_of_shape, nominal_cost
from evermesh.runtime.data import DataConfig, Sampler, StdlibSource

_VOCABULARY = 32_768
"""Assumed where no job says which model is trained."""
_FOREIGN = b'"evermesh-replay-1"'
_MOST_DIGITS = 12
_BASELINE = "restated"


class ClusterCost(CostModel):
    """Coefficients as a file gives them, and what they mean by inside a node."""

    ranks_per_node: PositiveInt | None = None
    """Workers that share a node; None: all do."""

    @model_validator(mode="after")
    def _a_network_needs_nodes(self) -> Self:
        if self.ranks_per_node is None and (self.network_token_s is not None or self.network_step_s is not None):
            raise ValueError("network_token_s and network_step_s need ranks_per_node, the workers of a node")
        return self


@dataclass(frozen=True, slots=True)
class Degrees:
    """What the command line says of the layout; None: what the source says, else 1 (hdp: 8)."""

    hdp: int | None = None
    tp: int | None = None
    pp: int | None = None
    capacity: int | None = None
    ranks_per_node: int | None = None
    """Workers of a node; None: what the cost model says, else all are in one."""

    def given(self) -> dict[str, int]:
        """The degrees of a layout that are given."""
        values = {name: getattr(self, name) for name in ("hdp", "tp", "pp", "capacity")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Case:
    """A plan and what it runs on."""

    plan: BatchPlan
    layout: Layout
    cost: CostModel
    pool: Pool
    shape: ModelShape | None = None
    """Of the model; None: nobody says which it is."""

    def timeline(self) -> Timeline:
        """When every rank runs what if nothing goes wrong."""
        return simulate_events(self.plan, self.layout, self.cost, Scenario(self.pool)).timeline


def read_case(
    source: Path,
    degrees: Degrees,
    cost: ClusterCost | None = None,
    batch: int = 1,
    baseline: str | None = None,
    sample: Path | None = None,
) -> Case:
    """The plan in ``source`` (ours or another system's, JSON), or that of a job's batch, or of a list of lengths.

    ``baseline`` plans with a restated peer instead of our planner. ``sample`` is a list of lengths that batches of a job are
    drawn from whose data is not here.

    Raises:
        ScenarioInvalid: it contradicts what the command line says. And what planning raises.
    """
    if source.suffix in {".yaml", ".yml"}:
        case = _of_job(source, degrees, cost, batch, sample)
    elif source.suffix == ".json":
        return _of_plan(source, degrees, cost)
    else:
        return case_of_lengths(source, degrees, cost, baseline)
    return case if baseline is None else restated(case, baseline)


def case_of_lengths(path: Path, degrees: Degrees, cost: ClusterCost | None = None, baseline: str | None = None) -> Case:
    """The plan of a list of lengths, under the nominal cost of the default model if there is no other.

    Without a capacity, ranks hold twice their share of the tokens, or what the longest sequence needs. Raises as
    ``read_case`` does.
    """
    lengths = read_lengths(path)
    hdp = degrees.hdp or 8
    capacity = degrees.capacity or max(-(-max(lengths) // hdp), -(-2 * sum(lengths) // hdp))
    layout = Layout(**{**degrees.given(), "hdp": hdp, "capacity": capacity})
    pool = pool_of(layout, degrees, cost)
    found, shape = (cost, None) if cost is not None else _nominal(layout)
    if baseline is None:
        return Case(plan_batch(lengths, layout, found, pool=pool), layout, found, pool, shape)
    empty = BatchPlan(lengths, capacity, ((),) * hdp, Certificate(0.0, 0.0, "nothing"), "", found.version, 0)
    return restated(Case(empty, layout, found, pool, shape), baseline)


def _of_job(path: Path, degrees: Degrees, cost: ClusterCost | None, batch: int, sample: Path | None) -> Case:
    """As the trainer plans the batch, counted from 1."""
    overrides = []
    if cost is not None:
        overrides.append(f"train.cost={cost.model_dump_json(exclude_none=True, exclude={'ranks_per_node'})}")
    if given := degrees.given():
        of_job = load_job(path).train.layout
        values = {name: given.get(name, getattr(of_job, name)) for name in ("hdp", "tp", "pp", "capacity")}
        overrides += [f"train.layout.{name}={value}" for name, value in values.items()]
        overrides.append(f"workers={values['hdp'] * values['tp'] * values['pp']}")
    train = load_job(path, overrides).train
    lengths, vocabulary = _lengths_of(train, batch) if sample is None else _drawn_for(train, batch, sample)
    shape = train.model.shape(vocabulary)
    found, pool = train.cost or nominal_cost(train, shape), pool_of(train.layout, degrees, cost)
    plan = plan_batch(lengths, train.layout, found, pool=pool)
    return Case(plan, train.layout, found, pool, shape)


def _lengths_of(train: TrainConfig, batch: int) -> tuple[tuple[int, ...], int]:
    """The lengths of a batch of the job's data, and its vocabulary."""
    corpora = open_corpora(train.data, Console(stderr=True))
    sampler = Sampler(corpora, train.data, train.seed)
    for _ in range(batch - 1):
        sampler.next_batch()
    return sampler.next_batch(ends=batch == train.steps).lengths, corpora[0].vocabulary


def _drawn_for(train: TrainConfig, batch: int, sample: Path) -> tuple[tuple[int, ...], int]:
    """The same for data that is not here."""
    batches = drawn_batches(read_lengths(sample), train.data.context, train.data.batch_tokens, batch)
    return batches[-1], train.model.vocabulary or _VOCABULARY


def _of_plan(path: Path, degrees: Degrees, cost: ClusterCost | None) -> Case:
    payload = read_bytes(path)
    plan = read_foreign(payload) if _FOREIGN in payload else BatchPlan.from_json(payload)
    found: Mapping[str, int] = {"hdp": len(plan.ranks), "capacity": plan.capacity}
    for name, value in found.items():
        asked = degrees.given().get(name, value)
        if asked != value:
            raise ScenarioInvalid(f"--{name} {asked}, but the plan in {path} has {value}. Leave --{name} out.")
    if any(micro_batch.lock_step is not None for micro_batches in plan.ranks for micro_batch in micro_batches):
        raise ScenarioInvalid(
            f"the ranks of the plan in {path} share experts or parameters, and it does not say which. Simulate its job."
        )
    layout = Layout(**{**degrees.given(), **found})
    pool = pool_of(layout, degrees, cost)
    used, shape = (cost, None) if cost is not None else _nominal(layout)
    bound = bound_for(plan.lengths, layout, used, pool)
    certified = dataclasses.replace(plan, certificate=Certificate(0.0, bound.seconds, bound.binding))
    return Case(certified, layout, used, pool, shape)


def restated(case: Case, name: str) -> Case:
    """The same batch as a peer plans it."""
    if name not in RESTATED:
        raise ScenarioInvalid(f"--baseline {name}: there is none. Choose one of {', '.join(RESTATED)}.")
    if case.layout.runs_in_waves:
        raise ScenarioInvalid(
            f"--baseline {name} plans for ranks that hold the whole model and keep step with nobody. Take pp 1, and share "
            "no experts or parameters."
        )
    lengths = case.plan.lengths
    ranks = RESTATED[name](lengths, case.layout, case.cost, case.pool)
    plan = dataclasses.replace(case.plan, ranks=ranks, planner=f"{name}, {_BASELINE}")
    makespan_s = dataclasses.replace(case, plan=plan).timeline().makespan_s
    bound = bound_for(lengths, case.layout, case.cost, case.pool)
    certificate = Certificate(makespan_s, bound.seconds, bound.binding)
    return dataclasses.replace(case, plan=dataclasses.replace(plan, certificate=certificate))


def pool_of(layout: Layout, degrees: Degrees, cost: ClusterCost | None) -> Pool:
    """The nodes of the HDP ranks: as the command line says, or as the cost model does.

    Raises:
        ScenarioInvalid: a model would be in two nodes.
    """
    workers = degrees.ranks_per_node or (cost.ranks_per_node if cost is not None else None)
    if workers is None:
        return Pool.of(layout.hdp)
    if workers % layout.tp:
        raise ScenarioInvalid(
            f"{workers} workers per node: {layout.tp} workers share a model and stay in one node. Give a multiple of "
            f"{layout.tp} as --ranks-per-node, or in the cost model."
        )
    return Pool.of(layout.hdp, workers // layout.tp)


def read_cost(path: Path | None) -> ClusterCost | None:
    """The coefficients in a JSON file.

    Raises:
        ScenarioInvalid: names the file and the first thing that is wrong.
    """
    if path is None:
        return None
    try:
        return ClusterCost.model_validate_json(read_bytes(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ScenarioInvalid(
            f"{path}: {where}: {first['msg']}. Give a JSON object with the coefficients of a cost model, such as "
            '{"token_s": 1e-6, "pair_s": 1e-11}.'
        ) from error


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


def read_bytes(path: Path) -> bytes:
    """What is in a file.

    Raises:
        ScenarioInvalid: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ScenarioInvalid(f"{path} cannot be read: {error.strerror}.") from error


def _nominal(layout: Layout) -> tuple[CostModel, ModelShape]:
    """Nominal coefficients of the default model on a CPU."""
    train = TrainConfig(data=DataConfig(sources=(StdlibSource(),)))  # only its model counts here
    shape = train.model.shape(_VOCABULARY)
    return cost_of_shape(shape, layout, threads=1, bytes_per_element=4), shape


__all__ = [
    "Case",
    "ClusterCost",
    "Degrees",
    "case_of_lengths",
    "pool_of",
    "read_bytes",
    "read_case",
    "read_cost",
    "read_lengths",
]

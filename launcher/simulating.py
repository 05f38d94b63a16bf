"""Simulates one step from the command line: what is read, what goes wrong in it, and what came out."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from evermesh.launcher.corpora import open_corpora
from evermesh.launcher.errors import ScenarioInvalid
from evermesh.launcher.job_file import load_job
from evermesh.launcher.planning import plan_of_job, read_lengths
from evermesh.parallelism.batch_plan import BatchPlan, Certificate
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import LayoutDoesNotFit, SequenceTooLong
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner import bound_for, plan_batch
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.simulator import Lost, Outcome, Scenario, SlowLink, SlowRank, simulate_events
from evermesh.parallelism.simulator.foreign import read_foreign
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.cost import cost_of_shape, nominal_cost
from evermesh.runtime.data import DataConfig, StdlibSource

_VOCABULARY = 32_768
"""Assumed where no job says which model is trained."""
_FOREIGN = b'"evermesh-replay-1"'
_NUMBER = r"(\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+)"
_SLOW = re.compile(rf"(\d+)={_NUMBER}(?:@{_NUMBER})?")
_SLOW_LINK = re.compile(rf"(\d+)-(\d+)={_NUMBER}")
_LOST = re.compile(rf"(\d+)@{_NUMBER}")


@dataclass(frozen=True, slots=True)
class Degrees:
    """What the command line says of the layout; None: what the source says, else 1 (hdp: 8)."""

    hdp: int | None = None
    tp: int | None = None
    pp: int | None = None
    capacity: int | None = None
    ranks_per_node: int | None = None
    """Workers of a node; None: all are in one."""

    def given(self) -> dict[str, int]:
        """The degrees of a layout that are given."""
        values = {name: getattr(self, name) for name in ("hdp", "tp", "pp", "capacity")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, as the command line writes it."""

    slow: Sequence[str] = ()
    """``RANK=FACTOR`` or ``RANK=FACTOR@SECONDS``."""
    slow_links: Sequence[str] = ()
    """``A-B=FACTOR``."""
    lost: Sequence[str] = ()
    """``RANK@SECONDS``."""

    def __bool__(self) -> bool:
        return bool(self.slow or self.slow_links or self.lost)


@dataclass(frozen=True, slots=True)
class Case:
    """A plan and what it runs on."""

    plan: BatchPlan
    layout: Layout
    cost: CostModel


@dataclass(frozen=True, slots=True)
class Simulated:
    """What became of a step."""

    case: Case
    undisturbed: Outcome
    """The same step when nothing goes wrong."""
    outcome: Outcome
    repeated_s: float | None
    """Where ranks were lost: seconds of the step when it is planned anew and run by the others; None: it cannot be."""
    lost_at_s: float | None

    @property
    def time_lost_s(self) -> float | None:
        """Seconds until the repeated step is done, more than undisturbed; detection and restart not counted."""
        if self.repeated_s is None or self.lost_at_s is None or self.undisturbed.step_s is None:
            return None
        return self.lost_at_s + self.repeated_s - self.undisturbed.step_s

    @property
    def picture(self) -> BatchPlan:
        """The plan with the makespan of the simulation, as the picture of it says."""
        certificate = dataclasses.replace(self.case.plan.certificate, makespan_s=self.outcome.timeline.makespan_s)
        return dataclasses.replace(self.case.plan, certificate=certificate)

    def as_json(self) -> dict[str, Any]:
        """All figures, by name."""
        timeline, certificate = self.outcome.timeline, self.case.plan.certificate
        busy = timeline.busy_s()
        return {
            "makespan_s": None if self.outcome.lost else timeline.makespan_s,
            "undisturbed_s": self.undisturbed.timeline.makespan_s,
            "bound_s": certificate.lower_bound_s,
            "binding": certificate.binding,
            "waiting_s": timeline.waited_s(),
            "ranks": [{"rank": label, "busy_s": seconds} for label, seconds in zip(timeline.labels, busy, strict=True)],
            "lost": [timeline.labels[rank] for rank in self.outcome.lost],
            "blocked": [
                {
                    "rank": timeline.labels[blocked.rank],
                    "since_s": blocked.since_s,
                    "micro_batch": blocked.micro_batch,
                    "for": timeline.labels[blocked.for_rank],
                    "root": timeline.labels[blocked.root],
                }
                for blocked in self.outcome.blocked
            ],
            "undone_tokens": self.outcome.undone_tokens,
            "repeated_s": self.repeated_s,
            "time_lost_s": self.time_lost_s,
        }


def read_case(source: Path, degrees: Degrees, cost: CostModel | None, batch: int) -> Case:
    """The plan in ``source`` (ours or another system's, JSON), or that of a job's batch, or of a list of lengths.

    Raises:
        ScenarioInvalid: it contradicts what the command line says. And what planning raises.
    """
    if source.suffix in {".yaml", ".yml"}:
        return _of_job(source, degrees, cost, batch)
    if source.suffix == ".json":
        return _of_plan(source, degrees, cost)
    lengths = read_lengths(source)
    hdp = degrees.hdp or 8
    capacity = degrees.capacity or max(-(-max(lengths) // hdp), -(-2 * sum(lengths) // hdp))
    layout = Layout(**{**degrees.given(), "hdp": hdp, "capacity": capacity})
    cost = cost or _nominal(layout)
    return Case(plan_batch(lengths, layout, cost), layout, cost)


def read_cost(path: Path | None) -> CostModel | None:
    """The coefficients in a JSON file.

    Raises:
        ScenarioInvalid: names the file and the first thing that is wrong.
    """
    if path is None:
        return None
    try:
        return CostModel.model_validate_json(_bytes(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ScenarioInvalid(
            f"{path}: {where}: {first['msg']}. Give a JSON object with the coefficients of a cost model, such as "
            '{"token_s": 1e-6, "pair_s": 1e-11}.'
        ) from error


def run(case: Case, degrees: Degrees, faults: Faults) -> Simulated:
    """Simulate a step with and without ``faults``.

    Raises:
        ScenarioInvalid, LayoutDoesNotFit: a fault is none, or names a rank that is not there.
    """
    clean = Scenario(_pool(case.layout, degrees.ranks_per_node))
    scenario = dataclasses.replace(clean, **_parsed(faults))
    undisturbed = simulate_events(case.plan, case.layout, case.cost, clean)
    outcome = simulate_events(case.plan, case.layout, case.cost, scenario) if faults else undisturbed
    lost = {rank // case.layout.pp for rank in outcome.lost}
    if not lost:
        return Simulated(case, undisturbed, outcome, None, None)
    lost_at_s = max(loss.at_s for loss in scenario.lost if loss.rank in lost)
    return Simulated(case, undisturbed, outcome, _repeated_s(case, scenario, lost), lost_at_s)


def _repeated_s(case: Case, scenario: Scenario, lost: set[int]) -> float | None:
    """Seconds of the same batch, planned for the ranks that are left."""
    kept = {rank: number for number, rank in enumerate(r for r in range(case.layout.hdp) if r not in lost)}
    slow_ranks = tuple(
        SlowRank(kept[slow.rank], slow.factor) for slow in scenario.slow_ranks if slow.rank in kept
    )  # by now they all are slow
    slow_links = tuple(
        SlowLink(kept[link.source], kept[link.target], link.factor)
        for link in scenario.slow_links
        if link.source in kept and link.target in kept
    )
    try:
        layout = Layout.model_validate({**case.layout.model_dump(), "hdp": len(kept)})
        plan = plan_batch(case.plan.lengths, layout, case.cost)
    except (LayoutDoesNotFit, SequenceTooLong, ValidationError):
        return None
    rest = Scenario(scenario.pool.without(lost), slow_ranks, slow_links)
    return simulate_events(plan, layout, case.cost, rest).step_s


def _pool(layout: Layout, ranks_per_node: int | None) -> Pool:
    if ranks_per_node is None:
        return Pool.of(layout.hdp)
    if ranks_per_node % layout.tp:
        raise ScenarioInvalid(
            f"--ranks-per-node {ranks_per_node}: {layout.tp} workers share a model and stay in one node. "
            f"Give a multiple of {layout.tp}."
        )
    return Pool.of(layout.hdp, ranks_per_node // layout.tp)


def _parsed(faults: Faults) -> dict[str, Any]:
    slow = [_match(_SLOW, text, "--slow", "RANK=FACTOR or RANK=FACTOR@SECONDS, such as 5=0.7") for text in faults.slow]
    links = [_match(_SLOW_LINK, text, "--slow-link", "A-B=FACTOR, such as 3-2=0.5") for text in faults.slow_links]
    lost = [_match(_LOST, text, "--lose", "RANK@SECONDS, such as 5@0.8") for text in faults.lost]
    return {
        "slow_ranks": tuple(SlowRank(int(rank), float(factor), float(at_s or 0)) for rank, factor, at_s in slow),
        "slow_links": tuple(SlowLink(int(source), int(target), float(factor)) for source, target, factor in links),
        "lost": tuple(Lost(int(rank), float(at_s)) for rank, at_s in lost),
    }


def _match(pattern: re.Pattern[str], text: str, option: str, form: str) -> tuple[str, ...]:
    found = pattern.fullmatch(text)
    if found is None:
        raise ScenarioInvalid(f"{option} {text}: write {form}.")
    return found.groups()


def _of_job(path: Path, degrees: Degrees, cost: CostModel | None, batch: int) -> Case:
    overrides = [] if cost is None else [f"train.cost={cost.model_dump_json(exclude_none=True)}"]
    if given := degrees.given():
        of_job = load_job(path).train.layout
        values = {name: given.get(name, getattr(of_job, name)) for name in ("hdp", "tp", "pp", "capacity")}
        overrides += [f"train.layout.{name}={value}" for name, value in values.items()]
        overrides.append(f"workers={values['hdp'] * values['tp'] * values['pp']}")
    config = load_job(path, overrides)
    plan = plan_of_job(config, batch, Console(stderr=True))
    if config.train.cost is not None:
        return Case(plan.plan, config.train.layout, config.train.cost)
    vocabulary = open_corpora(config.train.data, Console(stderr=True))[0].vocabulary
    return Case(plan.plan, config.train.layout, nominal_cost(config.train, config.train.model.shape(vocabulary)))


def _of_plan(path: Path, degrees: Degrees, cost: CostModel | None) -> Case:
    payload = _bytes(path)
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
    cost = cost or _nominal(layout)
    bound = bound_for(plan.lengths, layout, cost)
    return Case(dataclasses.replace(plan, certificate=Certificate(0.0, bound.seconds, bound.binding)), layout, cost)


def _nominal(layout: Layout) -> CostModel:
    train = TrainConfig(data=DataConfig(sources=(StdlibSource(),)))  # only its model counts here
    return cost_of_shape(train.model.shape(_VOCABULARY), layout, threads=1, bytes_per_element=4)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ScenarioInvalid(f"{path} cannot be read: {error.strerror}.") from error

"""Everything of a run that must survive a restart, and how it goes into a checkpoint and comes back."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import JsonValue, ValidationError

from evermesh import checkpoint
from evermesh.checkpoint import ForeignUnusable
from evermesh.checkpoint.background.saver import BackgroundSaver, SaveReport
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.naming import Naming
from evermesh.checkpoint.registry import Replicated, StateRegistry
from evermesh.checkpoint.relayout import Carrier, Holding, Moved, relayout
from evermesh.checkpoint.retention import Retention
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.stores.places import Place
from evermesh.parallelism.collectives import Communicator
from evermesh.runtime.errors import OtherRun
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.optimizer import ShardedOptimizer
from evermesh.runtime.weights import PARAMETER


@dataclass
class Progress:
    """Where a run stands; the same on every rank and independent of their number."""

    step: int = 0
    """Batches trained."""
    updates: int = 0
    """Batches whose update the guard let pass."""
    skipped_in_a_row: int = 0
    router_biases: list[list[float]] = field(default_factory=list)
    """By layer with experts, by expert; empty where routers have none."""
    expert_loads: list[list[list[int]]] = field(default_factory=list)
    """Of the last steps, by layer with experts, by expert: tokens that chose it; empty where nobody asks."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """State of the sampler after the last trained batch."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Of the cost model after the last trained batch, see ``OnlineCalibration``; empty where nobody calibrates it."""
    guard: dict[str, Any] = field(default_factory=dict)
    """Of the step guard after the last trained batch, see ``StepGuard``."""


class GivenUp(NamedTuple):
    """The state of one rank in a layout that is no longer used."""

    shard_map: ShardMap
    tensors: dict[str, Any]
    objects: dict[str, JsonValue]


class TrainingState:
    """The optimizer's shards and the progress of one rank, as a checkpoint sees them.

    Args:
        optimizer: holder of this rank's parameters and moments.
        shards: which rank holds which part of them, of all ranks.
        progress: counters, the data cursor and what is known of experts; restored in place.
        identity: what a checkpoint must agree with to be continued, such as the model's sizes; JSON values.
        communicator: the training ranks, on a backend that takes host tensors.
    """

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        shards: ShardMap,
        progress: Progress,
        identity: dict[str, Any],
        communicator: Communicator,
    ) -> None:
        self.optimizer, self.progress, self.identity, self.communicator = optimizer, progress, identity, communicator
        self.registry = StateRegistry()
        held = optimizer.owned_state()
        for name, tensor in shards.tensors.items():
            self.registry.register_tensor(name, tensor, held.get(name))
        for name in (part.name for part in dataclasses.fields(progress)):
            self.registry.register(name, Replicated(), *_attribute(progress, name))

    def saver(
        self, directory: Place, retention: Retention, *, incremental: bool, parity: int | None
    ) -> BackgroundSaver:
        """What saves this state below ``directory`` while training goes on. Collective.

        Raises:
            HostMemoryShort: on every rank, if any of them has no room for its copy.
        """
        return BackgroundSaver(
            directory,
            self.registry.shard_map,
            self.registry.tensors,
            communicator=self.communicator,
            keep=retention,
            incremental=incremental,
            parity=parity,
        )

    def begin_save(self, saver: BackgroundSaver, tell: Callable[[SaveReport | None], None]) -> Place:
        """Copy the current step for ``saver`` to write; returns where it will be. ``tell`` takes the report of the save
        before, if that was still under way. Collective.

        Raises:
            CheckpointNotSaved: on every rank, if the save before has failed.
        """
        tell(saver.begin(self.progress.step, self.registry.objects(self.communicator), self.identity))
        return saver.path_of(self.progress.step)

    def save(self, directory: Place, keep: int | Retention, parity: int | None = None) -> Place:
        """Write a checkpoint of the current step below ``directory``; returns its path. Collective.

        Raises:
            CheckpointNotSaved: on every rank, if any of them failed; earlier checkpoints are untouched.
        """
        return checkpoint.save(
            directory,
            self.progress.step,
            self.registry.shard_map,
            self.registry.tensors,
            self.registry.objects(self.communicator),
            communicator=self.communicator,
            keep=keep,
            description=self.identity,
            parity=parity,
        )

    def restore(self, path: Place) -> checkpoint.LoadResult:
        """Take over the state saved at ``path`` by any number of ranks. Collective.

        Raises:
            OtherRun: the checkpoint's identity differs; names what and how. Nothing was read.
            CheckpointNotFound, CheckpointMismatch, CheckpointCorrupt: see ``evermesh.checkpoint.load``.
        """
        self._check_identity(path)
        shard_map = self.registry.shard_map
        wanted = checkpoint.wanted_regions(shard_map, self.communicator.rank, self.registry.tensors)
        loaded = checkpoint.load(path, wanted, shard_map=shard_map, communicator=self.communicator)
        # an older version did not save them: they stay as they are
        own = self.registry.objects(self.communicator)
        self._restore_objects({name: own[name] for name in ("calibration", "guard")} | loaded.objects)
        return loaded

    def objects(self) -> dict[str, JsonValue]:
        """What a snapshot holds besides tensors: the same on every rank, so nobody is asked."""
        return self.registry.objects(self.communicator)

    def load_snapshot(self, source: checkpoint.Source) -> checkpoint.LoadResult:
        """Fill this rank's tensors from a snapshot; ``take_objects`` does the rest once all ranks have. Not collective.

        Raises:
            OtherRun: it is of another run. Nothing was read.
            CheckpointMismatch, CheckpointCorrupt: see ``evermesh.checkpoint.load``.
        """
        self._compare_identity(source.path, dict(source.description))
        shard_map = self.registry.shard_map
        wanted = checkpoint.wanted_regions(shard_map, self.communicator.rank, self.registry.tensors)
        return checkpoint.load(source, wanted, shard_map=shard_map)

    def take_objects(self, loaded: checkpoint.LoadResult) -> None:
        """Take over what a snapshot says besides tensors, which are filled. Collective."""
        self._restore_objects(loaded.objects)

    def _restore_objects(self, objects: Mapping[str, JsonValue]) -> None:
        self.registry.restore(objects, self.communicator.rank, self.communicator.size)
        self.optimizer.restore(self.progress.updates)
        self.optimizer.publish()

    def give_up(self) -> GivenUp:
        """Everything of this rank, with nothing else that the model or the optimizer hold. Collective.

        Parameters are copies: the live ones may be views of buffers that hold the values of a whole model.
        """
        held: dict[str, Any] = dict(self.registry.tensors)
        for name, regions in held.items():
            if name.startswith(PARAMETER):
                held[name] = [region.detach().clone() for region in regions]
        return GivenUp(self.registry.shard_map, held, self.registry.objects(self.communicator))

    def take_over(self, state: GivenUp, carrier: Carrier) -> Moved:
        """Take over what the ranks of another layout gave up; no tensor is left there. Collective.

        Raises:
            ShardMapInvalid, RegistryMismatch: it was not the state of this run.
        """
        mine = Holding(self.registry.shard_map, self.registry.tensors)
        moved = relayout(Holding(state.shard_map, state.tensors), mine, carrier, release=state.tensors.pop)
        self._restore_objects(state.objects)
        return moved

    def adopt(
        self, source: checkpoint.Source, names: Naming | None = None, updates: int | None = None
    ) -> checkpoint.LoadResult:
        """Take over weights and moments that another library saved, and go on after its updates. Collective.

        Its tensors have the names of ours (``parameter.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME``), or ``names`` says
        which they are (``evermesh.checkpoint.sources.with_prefixes``). Every rank reads the bytes of its own parts. The
        data begins anew: where it stood is known to the other library only. ``updates`` is the number of them; None: as
        the checkpoint says.

        Raises:
            ForeignUnusable: the checkpoint does not say how many updates were made.
            CheckpointMismatch, CheckpointCorrupt: see ``evermesh.checkpoint.load``.
        """
        made = updates if updates is not None else _updates_of(source)
        shard_map = self.registry.shard_map
        wanted = checkpoint.wanted_regions(shard_map, self.communicator.rank, self.registry.tensors)
        loaded = checkpoint.load(source, wanted, shard_map=shard_map, strict=False, names=names)
        self.progress.updates = made
        self.optimizer.restore(made)
        self.optimizer.publish()
        return loaded

    def _check_identity(self, path: Place) -> None:
        self._compare_identity(path, dict(read_manifest(path).description))

    def _compare_identity(self, path: Place, saved: dict[str, JsonValue]) -> None:
        if "model" in saved:
            saved["model"] = _with_defaults(saved["model"])  # an older version knew fewer fields
        differences = [
            f"{key} was {saved.get(key)!r} and is now {self.identity.get(key)!r}"
            for key in sorted(saved.keys() | self.identity.keys())
            if saved.get(key) != self.identity.get(key)
        ]
        if differences:
            raise OtherRun(
                f"{path} is a checkpoint of another run: {'; '.join(differences)}. "
                "Resume with the configuration it was made with, or launch a new run."
            )


def _updates_of(source: checkpoint.Source) -> int:
    """Updates that the moments have seen: the steps of an optimizer, or else those of the run."""
    groups: Any = source.objects.get("groups", [])
    steps = {group["numbers"]["step"] for group in groups if "step" in group["numbers"]}
    made = steps.pop() if len(steps) == 1 else source.step
    if made is None:
        raise ForeignUnusable(
            source.path, "it does not say how many updates were made", "Give their number: updates=N."
        )
    return int(made)


def _with_defaults(model: Any) -> Any:
    try:
        return ModelConfig.model_validate(model).model_dump(mode="json")
    except ValidationError:
        return model


def _attribute(owner: object, name: str) -> tuple[Any, Any]:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))

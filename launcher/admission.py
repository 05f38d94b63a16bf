"""What is refused before anything starts, with nothing lost: devices, sizes, and what a resumed run may not change."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from evermesh import checkpoint
from evermesh.checkpoint import CheckpointInfo
from evermesh.checkpoint.committing import committed_steps
from evermesh.checkpoint.stores.places import Place
from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import ClusterMissing, DevicesMissing, ResumeRefused, RunUnusable
from evermesh.launcher.job_file import load_job
from evermesh.launcher.placement.ray_here import is_in_copy
from evermesh.launcher.run_directory import Run
from evermesh.launcher.topology_file import read_topology
from evermesh.launcher.tracking.config import check_tracker
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.runtime.data.corpus import Corpus

_FIXED = ("model", "data", "seed", "dtype")
"""Parts of ``train`` that a run keeps for life: its weights and its order of data depend on them."""
_SAVED = ("model", "seed", "dtype")
"""Those of them that a checkpoint describes."""
_PLACES = {"path", "cache"}
"""Where data lies may change; that it is the same data is checked against the checkpoint."""


def check_devices(config: JobConfig) -> None:
    """Raise ``DevicesMissing`` unless every worker has a device."""
    if config.train.device.kind == "cpu" or config.on != "local":  # a cluster waits for nodes that have them
        return
    import torch

    found = torch.cuda.device_count()
    if found < config.workers:
        fewer = f", or use {found} workers" if found else ""
        raise DevicesMissing(
            f"train.device.kind is cuda and there are {config.workers} workers, one for each CUDA device, but torch "
            f"{torch.__version__} sees {found} devices here. Train on the CPU with "
            f"--set 'train.device={{kind: cpu}}'{fewer}."
        )


def check_place(config: JobConfig) -> None:
    """Raise what is wrong with a job that is to run on Ray.

    Raises:
        ClusterMissing: Ray is not installed.
        RunUnusable: the runs would be in a folder that Ray removes after the job.
    """
    if config.on in ("local", "slurm"):
        return
    check_ray(f"--on {config.on}")
    if is_in_copy(config.runs):
        raise RunUnusable(
            f"the runs would be in {config.runs.absolute()}, a copy of the working directory that Ray has made for this "
            "job: other nodes have others, and it is removed afterwards. Put them on storage that every node mounts at "
            "the same path: --set runs=DIR."
        )


def check_topology(config: JobConfig) -> None:
    """Raise ``LayoutRequestInvalid`` if the topology of the job cannot be read."""
    if config.topology is not None:
        read_topology(config.topology)


def check_trackers(config: JobConfig) -> None:
    """Raise ``TrackerMissing`` if the package of an experiment tracker of the job is not installed here."""
    for tracker in config.trackers:
        check_tracker(tracker)


def check_ray(asked: str) -> None:
    """Raise ``ClusterMissing`` if Ray is not installed, which is ``asked`` for."""
    if find_spec("ray") is None:
        raise ClusterMissing(f"{asked} needs Ray, which is not installed here: pip install 'evermesh[ray]'.")


def check_longest(config: JobConfig, corpora: Sequence[Corpus]) -> None:
    """Raise ``LayoutDoesNotFit`` unless all workers together can hold the longest sequence."""
    layout, context = config.train.layout, config.train.data.context
    workers_each = layout.world_size // layout.hdp
    longest = min(context, max(int(corpus.lengths.max()) for corpus in corpora))
    if longest > layout.hdp * layout.capacity:
        raise LayoutDoesNotFit(
            f"the data has sequences of {longest:,} tokens, but {layout.hdp} HDP ranks with a capacity of "
            f"{layout.capacity:,} tokens hold {layout.hdp * layout.capacity:,}. Set train.layout.capacity to at least "
            f"{-(-longest // layout.hdp):,}, use at least "
            f"{-(-longest // layout.capacity) * workers_each} workers, or lower data.context."
        )


def resumed_config(run: Run, workers: int | None, overrides: Sequence[str]) -> JobConfig:
    """The configuration of the next attempt: the run's own, without its ``stop_at``, with what is asked to change.

    Raises:
        ResumeRefused: the change would make it another run, or leaves nothing to do.
    """
    before = run.config()
    changes = ["train.stop_at=null", *_fitted(before, workers, overrides), *overrides]
    after = load_job(run.directory / "job.yaml", changes)
    _check_same_run(before, after)
    newest = _newest(run)
    _check_same_weights(run, after, newest)
    _check_work_left(run, after, newest.step)
    return after


def _fitted(before: JobConfig, workers: int | None, overrides: Sequence[str]) -> list[str]:
    """Overrides that give all workers to HDP ranks, when their number or another degree is to change."""
    asked = {key.strip(): value.strip() for key, _, value in (override.partition("=") for override in overrides)}
    values = {axis: asked.get(f"train.layout.{axis}", "") for axis in ("pp", "tp")}
    degrees = {axis: int(value) for axis, value in values.items() if value.isdecimal() and int(value) > 0}
    if workers is None and not degrees:
        return []
    workers = workers or before.workers
    if "train.layout.hdp" in asked:
        return [f"workers={workers}"]
    hdp = before.train.layout.model_copy(update=degrees).fitted_to(workers).hdp
    return [f"workers={workers}", f"train.layout.hdp={hdp}"]


def check_store(run: Run) -> None:
    """Raise what is wrong with the place of the checkpoints of a new run, if that is not its own directory.

    Raises:
        StoreUnusable: it is in an object store that does not answer, or refuses.
        RunUnusable: there are checkpoints of another run of this name.
    """
    if run.config().train.checkpoint.store is None:
        return
    newest = checkpoint.latest(run.checkpoints)
    if newest is not None:
        raise RunUnusable(
            f"{newest} is a checkpoint of another run of the name {run.name}. Give this one another name, or remove "
            f"what is in {run.checkpoints}."
        )


def incomplete(directory: Place) -> list[Place]:
    """Checkpoints in a folder of checkpoints that are not complete, oldest first."""
    complete = {info.path.name for info in checkpoint.checkpoints(directory)}
    found = committed_steps(directory)
    return [found[step] for step in sorted(found) if found[step].name not in complete]


def _check_same_run(before: JobConfig, after: JobConfig) -> None:
    changed = [f"train.{part}" for part in _FIXED if _content(before, part) != _content(after, part)]
    changed += [key for key in ("name", "runs") if getattr(before, key) != getattr(after, key)]
    if changed:
        raise ResumeRefused(
            f"{', '.join(changed)} cannot change when run {before.name} is resumed. Leave it as it is, or start a new "
            f"run with `evermesh launch`. What may change: --workers, and train.steps, stop_at, checkpoint, layout, "
            f"device, optimizer, evaluation.every, cost, timeout_s, max_skipped_steps, guard."
        )


def _content(config: JobConfig, part: str) -> Any:
    return _without_places(config.train.model_dump(mode="json")[part])


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(child) for key, child in value.items() if key not in _PLACES}
    return [_without_places(child) for child in value] if isinstance(value, list) else value


def _newest(run: Run) -> CheckpointInfo:
    newest = next((info for info in checkpoint.checkpoints(run.checkpoints) if info.is_latest), None)
    if newest is not None:
        return newest
    found = f"no checkpoint in {run.checkpoints}"
    for damaged in incomplete(run.checkpoints)[-1:]:
        found = f"only {damaged.name}, which is not complete (evermesh checkpoint verify {damaged})"
    raise ResumeRefused(
        f"run {run.name} has {found}; there is nothing to resume. "
        f"Start again: evermesh launch {run.directory / 'job.yaml'}"
    )


def _check_same_weights(run: Run, config: JobConfig, newest: CheckpointInfo) -> None:
    """The configuration was changed by hand, or the checkpoint is another run's: the workers would refuse it too."""
    saved: Any = checkpoint.describe(newest.path)["description"]
    now = config.train.model_dump(mode="json")
    different = [
        text for part in _SAVED if part in saved for text in _differences(f"train.{part}", saved[part], now[part])
    ]
    if different:
        raise ResumeRefused(
            f"{newest.path} was not made with {run.directory / 'job.yaml'}: {'; '.join(different)}. Put the old values "
            "back, or start a new run with `evermesh launch`."
        )


def _differences(key: str, saved: Any, now: Any) -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in sorted(saved.keys() | now.keys()):
            yield from _differences(f"{key}.{name}", saved.get(name), now.get(name))
    elif saved != now:
        yield f"{key} was {saved} and is now {now}"


def _check_work_left(run: Run, config: JobConfig, done: int) -> None:
    steps, stop_at = config.train.steps, config.train.stop_at
    if done >= steps:
        raise ResumeRefused(
            f"run {run.name} has finished: {done} of {steps} steps. To train it longer, set more steps: "
            f"evermesh resume {run.directory} --set train.steps={2 * done}"
        )
    if stop_at is not None and stop_at <= done:
        raise ResumeRefused(
            f"train.stop_at is {stop_at}, but run {run.name} is at step {done} already. Set a later step."
        )

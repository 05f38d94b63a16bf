"""A job goes on from memory on fewer nodes, on more, and on others; it computes what it would have computed anyway."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from evermesh.checkpoint import latest
from evermesh.fault.events import Event, read_events
from evermesh.fault.snapshot.keeper.area import area_of
from evermesh.fault.snapshot.keeper.process import KeeperProcess
from evermesh.fault.snapshot.remote import Keepers
from evermesh.fault.snapshot.snapshots import Keeping
from evermesh.runtime import TrainConfig, read_telemetry
from evermesh.runtime.trainer import Trainer
from tests.cluster import RankFailed, run_ranks
from tests.fault.snapshot.keepers import keeper_of, kill_keeper
from tests.fault.snapshot.members import SECRET
from tests.runtime.test_trainer import largest_difference, small_config

Parameters = dict[str, torch.Tensor]
STEPS = 8


def _config(corpus: Path) -> dict[str, Any]:
    """Of a run that writes no checkpoint before its end."""
    return small_config(
        corpus, checkpoint={"every": None}, snapshot={"every": 1}, layout={"capacity": 600}, steps=STEPS
    )


def _fit(
    rank: int,
    workers: int,
    values: dict[str, Any],
    directory: Path,
    generation: int,
    places: Sequence[int],
    keepers: Keepers,
    killed_at: int | None,
) -> Parameters:
    """Train on ranks at ``places`` (nodes); all of them die before they train step ``killed_at``."""
    os.environ["LOCAL_WORLD_SIZE"] = str(places.count(places[0]))
    config = TrainConfig.model_validate(values | {"layout": values["layout"] | {"hdp": workers}})
    area = area_of(directory, f"node-{places[rank]}")
    trainer = Trainer(config, directory=directory, keeping=Keeping(area, generation, keepers=keepers))
    step = trainer.train_step

    def train_step(batch: Any) -> Any:
        if trainer.progress.step + 1 == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(batch)

    trainer.train_step = train_step  # type: ignore[method-assign]
    trainer.fit()
    return {name: parameter.detach().clone() for name, parameter in trainer.built.model.named_parameters()}


@contextmanager
def _nodes(directory: Path, number: int) -> Iterator[list[KeeperProcess]]:
    directory.mkdir(exist_ok=True)
    with ExitStack() as stack:
        yield [stack.enter_context(keeper_of(directory, f"node-{node}", secret=SECRET)) for node in range(number)]


class _Job:
    """Attempts of one run, one after the other."""

    def __init__(self, corpus: Path, directory: Path, nodes: Sequence[KeeperProcess]) -> None:
        addresses = tuple(node.address for node in nodes if node.address is not None)
        self._values, self._directory, self._generation = _config(corpus), directory, 0
        self._keepers = Keepers(addresses, "launch", SECRET)

    def run(self, places: Sequence[int], killed_at: int | None = None) -> Parameters:
        """One attempt; what its first rank has in the end."""
        self._generation += 1
        arguments = (self._values, self._directory, self._generation, tuple(places), self._keepers, killed_at)
        if killed_at is not None:
            with pytest.raises(RankFailed):
                run_ranks(len(places), _fit, *arguments)
            assert latest(self._directory / "checkpoints") is None, "there is nothing in storage"
            return {}
        parameters: Parameters = run_ranks(len(places), _fit, *arguments)[0]
        return parameters

    def resumed(self) -> list[Event]:
        return [event for event in read_events(self._directory / "events.jsonl") if event.kind == "resumed"]

    def losses(self) -> list[float]:
        return [report.loss for report in read_telemetry(self._directory / "telemetry.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Parameters, list[float]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    with _nodes(directory, 2) as nodes:
        job = _Job(corpus, directory, nodes)
        return job.run((0, 1)), job.losses()


def _is_the_same(job: _Job, parameters: Parameters, undisturbed: tuple[Parameters, list[float]]) -> None:
    assert largest_difference(parameters, undisturbed[0]) <= 1e-9
    assert job.losses() == pytest.approx(undisturbed[1], rel=1e-9)


def test_f9_a_job_shrinks_and_grows_back_out_of_the_memory_of_all_nodes(
    corpus: Path, undisturbed: tuple[Parameters, list[float]], tmp_path: Path
) -> None:
    with _nodes(tmp_path, 3) as nodes:
        job = _Job(corpus, tmp_path, nodes)
        job.run((0, 1), killed_at=4)
        job.run((0,), killed_at=6)
        parameters = job.run((0, 2))  # rank 0 may still have the old layout in a slot: the later attempt counts
        shrunk, grown = job.resumed()
        assert [event.fields["source"] for event in (shrunk, grown)] == ["memory"] * 2
        assert 1 <= int(str(shrunk.step)) < 4
        assert 3 <= int(str(grown.step)) < 6
        assert int(str(grown.step)) >= int(str(shrunk.step))
        assert "of attempt 2, on 2 workers" in grown.text
        assert int(str(shrunk.fields["bytes_received"])) > 0
        assert int(str(grown.fields["bytes_received"])) > 0
    _is_the_same(job, parameters, undisturbed)


def test_f8_another_node_takes_the_place_of_one_whose_keeper_lives(
    corpus: Path, undisturbed: tuple[Parameters, list[float]], tmp_path: Path
) -> None:
    with _nodes(tmp_path, 3) as nodes:
        job = _Job(corpus, tmp_path, nodes)
        job.run((0, 1), killed_at=5)
        parameters = job.run((0, 2))
        (resumed,) = job.resumed()
        assert 2 <= int(str(resumed.step)) < 5
        assert int(str(resumed.fields["bytes_received"])) > 0
    assert largest_difference(parameters, undisturbed[0]) == 0.0
    assert job.losses() == undisturbed[1]


def test_without_the_memory_of_a_node_that_nobody_copied_the_job_begins_anew(
    corpus: Path, undisturbed: tuple[Parameters, list[float]], tmp_path: Path
) -> None:
    with _nodes(tmp_path, 2) as nodes:
        job = _Job(corpus, tmp_path, nodes)
        job.run((0, 1), killed_at=4)
        kill_keeper(nodes[1].area)
        parameters = job.run((0,))
        assert job.resumed() == []
        (told,) = (event for event in read_events(tmp_path / "events.jsonl") if "not all keepers" in event.text)
        assert str(nodes[1].area) not in told.text
        assert SECRET.decode() not in (tmp_path / "events.jsonl").read_text()
    _is_the_same(job, parameters, undisturbed)

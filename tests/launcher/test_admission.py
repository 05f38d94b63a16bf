"""What is refused before a worker starts: the message, the exit code, and that nothing was touched."""

import json
import shutil
from pathlib import Path

import pytest

from evermesh.launcher import Run, load_job
from evermesh.launcher.admission import check_devices, incomplete, resumed_config
from evermesh.launcher.errors import DevicesMissing, ResumeRefused
from evermesh.launcher.operations import _way_on
from tests.launcher.test_cli import evermesh


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that one process has trained up to step 4 of 6, with checkpoints of the steps 2 and 4."""
    from evermesh.runtime import Trainer

    folder = tmp_path_factory.mktemp("trained")
    model = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 2, "ffn": 32}
    data = {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 256, "batch_tokens": 1024}
    train = {"steps": 6, "stop_at": 4, "model": model, "data": data, "checkpoint": {"every": 2}}
    (folder / "job.yaml").write_text(json.dumps({"name": "small", "runs": str(folder / "runs"), "train": train}))
    run = Run.create(load_job(folder / "job.yaml"))
    Trainer(run.config().train, directory=run.directory).fit()
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of it that a test may damage."""
    shutil.copytree(trained.directory, tmp_path / "small")
    return Run.open(tmp_path / "small")


def edit(run: Run, old: str, new: str) -> None:
    path = run.directory / "job.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(("found", "fewer"), [(0, ""), (1, ", or use 1 workers")])
def test_more_workers_than_devices_are_refused(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, found: int, fewer: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    config = load_job(job_file, ["train.device={kind: cuda}"])
    with pytest.raises(DevicesMissing, match=f"sees {found} devices here") as caught:
        check_devices(config)
    assert str(caught.value).endswith(f"Train on the CPU with --set 'train.device={{kind: cpu}}'{fewer}.")


def test_a_job_for_devices_that_are_not_there_makes_no_run(job_file: Path) -> None:
    found = evermesh("launch", job_file, "--set", "train.device={kind: cuda}", "--set", "workers=99")
    assert found.returncode == 2
    assert "there are 99 workers, one for each CUDA device" in found.stderr
    assert not (job_file.parent / "runs").exists()


def test_a_model_that_was_edited_by_hand_is_refused_with_both_values(run: Run) -> None:
    edit(run, "layers: 1", "layers: 3")
    before = (run.directory / "state.json").read_bytes()
    found = evermesh("resume", run.directory)
    assert found.returncode == 2
    path, job = run.directory / "checkpoints" / "step-00000004", run.directory / "job.yaml"
    assert f"error: {path} was not made with {job}: train.model.layers was 1 and is now 3. Put" in found.stderr
    assert (run.directory / "state.json").read_bytes() == before


def test_a_run_without_a_checkpoint_says_how_to_start_again(run: Run) -> None:
    shutil.rmtree(run.directory / "checkpoints")
    with pytest.raises(ResumeRefused, match=r"run small has no checkpoint in .* Start again: evermesh launch"):
        resumed_config(run, None, [])


def test_a_step_that_is_behind_the_checkpoint_is_refused(run: Run) -> None:
    with pytest.raises(ResumeRefused, match="has finished: 4 of 3 steps"):
        resumed_config(run, None, ["train.steps=3"])
    with pytest.raises(ResumeRefused, match=r"train\.stop_at is 4, but run small is at step 4 already"):
        resumed_config(run, None, ["train.stop_at=4"])


@pytest.mark.parametrize(
    ("workers", "overrides", "tp", "hdp"),
    [
        (4, ["train.layout.tp=2"], 2, 2),
        (2, [], 1, 2),
        (None, ["train.layout.tp=2", "workers=2", "train.layout.hdp=1"], 2, 1),
    ],
)
def test_a_resume_may_change_the_tensor_parallel_degree(
    run: Run, workers: int | None, overrides: list[str], tp: int, hdp: int
) -> None:
    layout = resumed_config(run, workers, overrides).train.layout
    assert (layout.tp, layout.hdp) == (tp, hdp)


def test_a_flipped_bit_is_found_and_the_file_named(run: Run) -> None:
    path = run.directory / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = evermesh("checkpoint", "verify", run.directory)
    assert found.returncode == 1
    assert "rank-00000.safetensors" in found.stdout
    assert "damaged, 1 problem;" in found.stdout
    as_json = evermesh("checkpoint", "verify", run.directory, "--json")
    assert as_json.returncode == 1
    assert [problem["file"] for problem in json.loads(as_json.stdout)["problems"]] == ["rank-00000.safetensors"]


def test_a_checkpoint_that_lost_bytes_is_listed_as_not_complete_and_the_one_before_it_is_used(run: Run) -> None:
    damaged = run.directory / "checkpoints" / "step-00000004"
    (damaged / "rank-00000.safetensors").write_bytes(b"")
    assert incomplete(run.directory / "checkpoints") == [damaged]
    assert f"evermesh checkpoint verify {damaged}" in evermesh("checkpoint", "ls", run.directory).stdout
    found = evermesh("checkpoint", "verify", damaged)
    assert found.returncode == 1
    assert "it has 0 bytes" in found.stdout
    assert resumed_config(run, None, ["train.stop_at=3"]).train.stop_at == 3

    shutil.rmtree(run.directory / "checkpoints" / "step-00000002")
    with pytest.raises(ResumeRefused, match="has only step-00000004, which is not complete"):
        resumed_config(run, None, [])


def test_the_way_on_is_the_newest_checkpoint_unless_the_error_is_about_that(run: Run) -> None:
    assert _way_on(run, "a worker died").endswith(
        f"step-00000004; go on from there with: evermesh resume {run.directory}"
    )
    assert _way_on(run, "step-00000004/rank-00000: wrong checksum").startswith(
        "To go on from step-00000002, move step-00000004 out of"
    )
    shutil.rmtree(run.directory / "checkpoints" / "step-00000002")
    assert "There is no checkpoint but step-00000004" in _way_on(run, "step-00000004/rank-00000: wrong checksum")
    shutil.rmtree(run.directory / "checkpoints")
    assert "There is no checkpoint yet; start again with: evermesh launch" in _way_on(run)


def test_what_is_shown_of_a_checkpoint_is_json_on_request(run: Run) -> None:
    assert [row["step"] for row in json.loads(evermesh("checkpoint", "ls", run.directory, "--json").stdout)] == [2, 4]
    newest = run.directory / "checkpoints" / "step-00000004"
    shown = json.loads(evermesh("checkpoint", "show", newest / "manifest.json", "--json").stdout)
    assert (shown["step"], shown["world_size"]) == (4, 1)

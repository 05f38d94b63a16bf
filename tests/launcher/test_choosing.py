"""Which place a job gets that leaves the choice, and what is refused of one that is to run on Ray, by what is seen here."""

import socket
from pathlib import Path

import pytest

from evermesh.launcher.admission import check_place
from evermesh.launcher.errors import JobFileInvalid, RunUnusable, SlurmSilent
from evermesh.launcher.job_file import load_job
from evermesh.launcher.placement.choosing import placed


@pytest.fixture(autouse=True)
def nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def test_auto_is_the_ray_cluster_that_this_machine_has_joined_while_its_head_answers(
    job_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    job = load_job(job_file, ["on=auto"])
    assert placed(job).on == "local"
    (tmp_path / "ray").mkdir()
    left = tmp_path / "ray" / "ray_current_cluster"  # by `ray start`
    with socket.create_server(("127.0.0.1", 0)) as head:
        left.write_text(f"127.0.0.1:{head.getsockname()[1]}")
        assert placed(job).on == "ray"
    assert placed(job).on == "local", "the machine was switched off, say, and the file is left"


@pytest.mark.parametrize(("address", "place"), [("10.0.0.1:6379", "ray"), ("http://10.0.0.1:8265", "local")])
def test_auto_is_the_cluster_of_ray_address_unless_that_is_where_jobs_are_submitted(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, address: str, place: str
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert placed(load_job(job_file, ["on=auto"])).on == place


def test_auto_is_a_slurm_allocation_before_all_else(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmSilent, match="scontrol"):
        placed(load_job(job_file, ["on=auto"]))


def test_runs_in_a_folder_that_ray_removes_after_the_job_are_refused(job_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    with pytest.raises(RunUnusable, match=r"removed afterwards. Put them on storage that every node mounts"):
        check_place(load_job(job_file, ["on=ray", f"runs={copy / 'runs'}"]))


def test_cpus_and_gpus_of_a_node_are_not_named_among_its_resources(job_file: Path) -> None:
    with pytest.raises(JobFileInvalid, match=r"ray.resources: GPU follows from workers, nodes and train.device"):
        load_job(job_file, ["ray.resources={GPU: 1}"])

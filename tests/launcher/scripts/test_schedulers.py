"""Machines that a hostfile or a scheduler names, each with the variables that it really sets."""

import itertools
from pathlib import Path

import pytest

from evermesh.launcher.scripts.environment import visible
from evermesh.launcher.scripts.errors import ScriptRefused
from evermesh.launcher.scripts.flags import read
from evermesh.launcher.scripts.hostfile import parse, select, told_by_hostfile
from evermesh.launcher.scripts.options import ScriptJob, script_job
from evermesh.launcher.scripts.schedulers import Told
from evermesh.launcher.scripts.where import Machines, ThisMachine
from tests.launcher.scripts.conftest import Launcher

SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_TASK_ID": "sky-2026-11-01-00-00-00-000000_train_1",
}
PYTORCHJOB = {"MASTER_ADDR": "train-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "3", "RANK": "2"}
PYTORCHJOB_PET = PYTORCHJOB | {
    "WORLD_SIZE": "6",
    "PET_NNODES": "3",
    "PET_NODE_RANK": "2",
    "PET_NPROC_PER_NODE": "2",
    "PET_MASTER_ADDR": "train-master-0",
    "PET_MASTER_PORT": "23456",
}
VOLCANO = PYTORCHJOB | {"VC_TASK_INDEX": "1", "VC_MASTER_HOSTS": "train-master-0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_NODE_RANK": "0",
    "MASTER_ADDR": "node0",
}
HYDRA = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "PMI_FD": "9",
    "MPI_LOCALNRANKS": "1",
    "MPI_LOCALRANKID": "0",
    "MASTER_ADDR": "node0",
}
SLURM_STEP = {
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[003-004]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}


def job(*arguments: str, **variables: str) -> ScriptJob:
    return script_job([*arguments, "-m", "somewhere.train"], variables)


@pytest.mark.parametrize(
    ("variables", "nodes", "rank", "source", "address", "workers"),
    [
        (SKYPILOT, 2, 1, "SKYPILOT_NODE_RANK", ("10.0.0.1", 29500), 8),
        (SKYPILOT | {"SKYPILOT_NUM_GPUS_PER_NODE": "0"}, 2, 1, "SKYPILOT_NODE_RANK", ("10.0.0.1", 29500), 1),
        (PYTORCHJOB, 3, 2, "RANK", ("train-master-0", 23456), 1),
        (PYTORCHJOB_PET, 3, 2, "PET_NODE_RANK", ("train-master-0", 23456), 2),
        (VOLCANO, 3, 2, "RANK", ("train-master-0", 23456), 1),
        (OPEN_MPI, 4, 3, "OMPI_COMM_WORLD_RANK", ("node0", 29500), 1),
        (HYDRA, 4, 3, "PMI_RANK", ("node0", 29500), 1),
        (SLURM_STEP, 2, 1, "SLURM_NODEID", ("gpu003", 29500), 1),
    ],
)
def test_without_flags_the_machines_are_those_of_the_scheduler(
    variables: dict[str, str], nodes: int, rank: int, source: str, address: tuple[str, int], workers: int
) -> None:
    found = job(**variables)
    assert found.workers == workers
    assert found.where == Machines(
        nodes=nodes, node_rank=rank, node_rank_from=source, master_addr=address[0], master_port=address[1]
    )


@pytest.mark.parametrize("variables", [SKYPILOT, PYTORCHJOB, OPEN_MPI, HYDRA, SLURM_STEP])
def test_flags_say_more_than_schedulers(variables: dict[str, str]) -> None:
    found = job("--nnodes=5", "--node-rank=4", "--master-addr=a", "--master-port=7", "--workers=3", **variables)
    assert found.workers == 3
    assert found.where == Machines(nodes=5, node_rank=4, node_rank_from="--node-rank", master_addr="a", master_port=7)
    assert job("--standalone", **variables).where == ThisMachine()
    assert job("--nnodes=1", **variables).where == ThisMachine()


def test_a_rank_of_another_launcher_is_no_pod() -> None:
    assert job(**PYTORCHJOB, LOCAL_RANK="0").where == ThisMachine()


def test_a_batch_script_and_steps_of_many_tasks_are_one_machine_unless_flags_say_more() -> None:
    batch = {name: value for name, value in SLURM_STEP.items() if not name.startswith(("SLURM_STEP_NUM", "PMI"))}
    assert job(**batch).where == ThisMachine()
    assert job(**SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "8"}).where == ThisMachine()


@pytest.mark.parametrize(
    "variables", [OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, HYDRA | {"MPI_LOCALNRANKS": "2"}]
)
def test_several_launchers_of_mpirun_on_a_machine_are_refused(variables: dict[str, str]) -> None:
    with pytest.raises(ScriptRefused, match=r"mpirun has started 2 launchers on this machine.*ppr:1:node"):
        job(**variables)


def test_mpirun_without_an_address_is_refused_with_the_way_out() -> None:
    without = {name: value for name, value in OPEN_MPI.items() if name != "MASTER_ADDR"}
    with pytest.raises(ScriptRefused, match=r"node 3 of 4 \(OMPI_COMM_WORLD_RANK\) does not know where node 0 is"):
        job(**without)


HOSTS = "# the cluster\nworker-0 slots=4\n\nworker-1   slots=2 # two are broken\nworker-2 slots=3\n"
FILTERS = [
    *itertools.product(
        [False], ["worker-1", "worker-0@worker-2:0,2", "worker-2:1@worker-2:0@worker-0:3", "worker-1:1,1"]
    ),
    *itertools.product([True], ["worker-1", "worker-0:0,2@worker-2", "worker-1:0,1", "worker-2:1@worker-2:0"]),
]


@pytest.mark.parametrize(("excludes", "text"), FILTERS)
def test_hostfiles_and_filters_mean_what_they_mean_to_deepspeed(excludes: bool, text: str) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    pool = runner._parse_hostfile(HOSTS.splitlines())
    theirs = runner.parse_inclusion_exclusion(pool, "" if excludes else text, text if excludes else "")
    ours = select(parse(HOSTS), text, excludes=excludes)
    assert list(ours.items()) == [(host, tuple(slots)) for host, slots in theirs.items()]


def told(tmp_path: Path, *flags: str, here: str = "worker-1") -> Told:
    (tmp_path / "hosts").write_text(HOSTS)
    line = read(["--hostfile", str(tmp_path / "hosts"), *flags, "-m", "train"], {})
    return told_by_hostfile(line, {here, "localhost"})


def test_a_machine_finds_itself_in_the_hostfile(tmp_path: Path) -> None:
    assert told(tmp_path) == Told(3, 1, "--hostfile", "worker-0", workers=2, slots=(0, 1))
    assert told(tmp_path, "--exclude", "worker-0") == Told(2, 0, "--hostfile", "worker-1", workers=2, slots=(0, 1))
    found = told(tmp_path, "-i", "worker-2:1@worker-1", here="worker-2")
    assert found == Told(2, 1, "--hostfile", "worker-1", workers=1, slots=(1,))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--include", "worker-0"],
            r"this machine \(localhost, worker-1\) is none of worker-0. Start the same command",
        ),
        (["--include", "worker-9"], "there is no machine 'worker-9'; there are worker-0, worker-1, worker-2"),
        (["--include", "worker-1:2"], "worker-1 has no slot 2; it has 2"),
        (["--include", "worker-1:x"], "is not HOST:SLOT,SLOT"),
        (["--include", "worker-1", "--exclude", "worker-0"], "exclude each other"),
        (["--exclude", "worker-0@worker-1@worker-2"], "leaves no slot"),
    ],
)
def test_filters_that_cannot_be_are_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ScriptRefused, match=message):
        told(tmp_path, *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [("worker-0", "is not HOST slots=N"), ("a slots=1\na slots=2", "a is named twice"), ("#\n", "it names no machine")],
)
def test_a_hostfile_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ScriptRefused, match=rf"--hostfile .*: .*{message}.*worker-0 slots=8"):
        job("--hostfile", str(tmp_path / "hosts"))


def test_slots_are_those_that_are_visible_already_and_no_others() -> None:
    assert visible((0, 2), {}) == "0,2"
    assert visible((0, 2), {"CUDA_VISIBLE_DEVICES": "4,5,6"}) == "4,6"
    with pytest.raises(
        ScriptRefused, match="GPU 2 of this machine is asked for, but CUDA_VISIBLE_DEVICES=4,5 leaves 2"
    ):
        job("--include", "localhost:0,2", CUDA_VISIBLE_DEVICES="4,5")


PRINT = "import os; print(os.environ['LOCAL_RANK'], os.environ['CUDA_VISIBLE_DEVICES'], os.environ['WORLD_SIZE'])"


def test_ranks_see_the_slots_of_their_machine(launcher: Launcher) -> None:
    (launcher.folder / "hosts").write_text("localhost slots=4\n")
    flags = ("--hostfile", "hosts", "--include", "localhost:1,3", "--tee", "1", launcher.script(PRINT))
    assert sorted(launcher.run(*flags).stdout.splitlines()) == ["[0] 0 1,3 2", "[1] 1 1,3 2"]
    done = launcher.run("--virtual-local-rank", *flags)
    assert sorted(done.stdout.splitlines()) == ["[0] 0 1 2", "[1] 0 3 2"], done.stderr


def test_two_launchers_of_mpirun_meet_without_flags(launcher: Launcher, port: int) -> None:
    script = launcher.script("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['GROUP_RANK'])")
    variables = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    machines = [
        launcher.start("--workers", "2", "--tee", "1", script, **variables, OMPI_COMM_WORLD_RANK=str(rank))
        for rank in range(2)
    ]
    outputs = [machine.communicate(timeout=60)[0].splitlines() for machine in machines]
    assert [sorted(lines) for lines in outputs] == [["[0] 0 4 0", "[1] 1 4 0"], ["[2] 2 4 1", "[3] 3 4 1"]]

"""The command line of scripts: torchrun's flags, their variables, and what is refused."""

import sys
from pathlib import Path

import pytest

from evermesh.launcher.scripts import is_script
from evermesh.launcher.scripts.errors import ScriptRefused
from evermesh.launcher.scripts.flags import FLAGS, NOT_TAKEN
from evermesh.launcher.scripts.options import PythonModule, ScriptJob, script_job
from evermesh.launcher.scripts.where import Machines, ThisMachine

OURS_ALONE = {
    "--nodes",
    "--workers",
    "--grace",
    "--no-record",
    "--preflight",
    "--hostfile",
    "-H",
    "--include",
    "-i",
    "--exclude",
    "-e",
}


def job(*arguments: str, **variables: str) -> ScriptJob:
    return script_job([*arguments, "-m", "somewhere.train"], variables)


def test_the_flags_are_those_of_torchrun_with_few_exceptions() -> None:
    from torch.distributed.run import get_args_parser

    names = {name for action in get_args_parser()._actions for name in action.option_strings}
    theirs = {name for name in names if "_" not in name} - {"--help", "-h"}
    assert {name for flag in FLAGS for name in flag.names} - OURS_ALONE == theirs - NOT_TAKEN.keys()
    assert theirs >= NOT_TAKEN.keys()


def test_every_flag_of_torchrun_is_taken_or_refused_with_a_way_out() -> None:
    from torch.distributed.run import get_args_parser

    needed = {"rdzv_backend": "c10d", "rdzv_endpoint": "here:1", "rdzv_conf": "timeout=9", "nnodes": "1:2"}
    spellings = [
        (spelling, [] if action.nargs == 0 else [needed.get(action.dest, "1")])
        for action in get_args_parser()._actions
        for spelling in action.option_strings
        if action.dest != "help"
    ]
    assert len(spellings) > 50
    for spelling, value in spellings:
        nodes = ["--nnodes=2", "--master-addr=here"] if spelling.startswith("--node") else []
        words = [*nodes, spelling, *value, sys.executable]  # a file, a program, and what -m does not look for
        if spelling.replace("_", "-") in NOT_TAKEN:
            with pytest.raises(ScriptRefused, match=r"a flag of torchrun's, is not supported\. .*Leave it out"):
                script_job(words, {})
        else:
            assert script_job(words, {}).workers == 1, spelling


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_variable_of_a_flag_that_is_not_taken_is_refused_too(name: str) -> None:
    variable = "PET_" + name[2:].replace("-", "_").upper()
    with pytest.raises(ScriptRefused, match=f"{variable} is set, but {name} of torchrun's is not supported"):
        job(**{variable: "x"})


@pytest.mark.parametrize(
    "spelling",
    [
        ["--nproc-per-node", "3"],
        ["--nproc_per_node=3"],
        ["--workers", "3"],
        ["--nnodes", "1:4", "--nproc-per-node=3", "--rdzv-backend", "c10d", "--rdzv_endpoint=localhost:0"],
    ],
)
def test_the_number_of_ranks_can_be_spelled_like_torchruns(spelling: list[str]) -> None:
    assert job(*spelling).workers == 3


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default() -> None:
    variables = {"PET_NPROC_PER_NODE": "4", "PET_MAX_RESTARTS": "7", "PET_STANDALONE": "0"}
    found = job("--workers", "2", **variables)
    assert (found.workers, found.max_restarts) == (2, 7)


def test_what_follows_the_script_belongs_to_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    found = script_job(["--workers=2", str(tmp_path / "train.py"), "--workers", "9", "--help", "${local_rank}"], {})
    assert found.workers == 2
    assert found.command(1) == [sys.executable, "-u", str(tmp_path / "train.py"), "--workers", "9", "--help", "1"]


def test_the_value_of_a_flag_is_not_taken_for_the_script() -> None:
    found = script_job(
        ["--log-dir", "logs", "-r", "0:1,1:2", "-m", "somewhere.train", "x"], {"PET_NPROC_PER_NODE": "2"}
    )
    assert found.script == PythonModule(name="somewhere.train")
    assert found.redirects == (1, 2)


def test_rank_0_is_shown_unless_flags_say_otherwise() -> None:
    def shown(*arguments: str) -> list[tuple[int, int]]:
        found = job("--workers", "3", *arguments)
        return [(rank, stream) for rank in range(3) for stream in (1, 2) if found.shows(rank, stream)]

    assert shown() == [(0, 1), (0, 2)]
    assert shown("--redirects", "3") == []
    assert shown("--tee", "1:2") == [(0, 1), (0, 2), (1, 2)]
    assert shown("--local-ranks-filter", "2") == [(2, 1), (2, 2)]
    assert shown("--local-ranks-filter", "1,2", "--redirects", "1") == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc-per-nod", "2"], "there is no flag --nproc-per-nod. Did you mean --nproc-per-node?"),
        (["--num_gpus", "2"], "there is no flag --num_gpus, which is another launcher's. Use --workers."),
        (["--launcher=pdsh"], "Run the same command on every machine"),
        (["--max_restart=2"], "there is no flag --max_restart. Did you mean --max-restarts?"),
        (["--nnodes", "2:4"], "asks for 2 to 4 nodes, but the number of nodes of a script is fixed"),
        (["--nnodes", "2", "--node-rank", "1"], "node 1 of 2 (--node-rank) does not know where node 0 is"),
        (
            ["--nnodes", "2", "--node-rank", "2", "--master-addr", "a"],
            "--node-rank is 2, but 2 nodes have the numbers 0",
        ),
        (["--node-rank", "1"], "--node-rank is 1, but there is 1 node. Give --nnodes as well."),
        (["--nnodes", "2", "--rdzv-backend", "etcd", "--rdzv-endpoint", "a:1"], "nodes meet without a server here"),
        (["--nnodes=2", "--master-addr=a", "--rdzv-conf", "join_timeout=long"], "join_timeout is 'long'"),
        (["--nnodes", "3:1"], "neither N nor MIN:MAX"),
        (["--workers", "0"], "Give a number from 1, auto, gpu or cpu"),
        (["--workers", "2", "--nproc-per-node", "3"], "--workers is 2 and --nproc-per-node is 3. Give one."),
        (["--max-restarts", "-1"], "Give a whole number from 0"),
        (["--tee", "4"], "Give 0 to 3"),
        (["--standalone=1"], "--standalone takes no value"),
        (["--no-python"], "exclude each other"),
        (["--rdzv-endpoint", "somewhere"], "is not HOST:PORT"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_way_out(arguments: list[str], message: str) -> None:
    with pytest.raises(ScriptRefused) as caught:
        job(*arguments)
    assert message in str(caught.value)


def test_a_variable_that_is_wrong_is_named() -> None:
    with pytest.raises(ScriptRefused, match="PET_NNODES is 'many'"):
        job(PET_NNODES="many")


def test_nodes_without_an_address_are_all_on_this_machine() -> None:
    assert job("--nodes", "3").where == ThisMachine(nodes=3)
    assert job("--nodes", "3", "--standalone", PET_NODE_RANK="1").where == ThisMachine(nodes=3)


STATIC = ("--nnodes", "2", "--master-addr", "node0", "--master-port", "2000")


@pytest.mark.parametrize(
    ("arguments", "variables", "rank", "source"),
    [
        ((*STATIC, "--node-rank", "1"), {}, 1, "--node-rank"),
        (("--nnodes=2", "--node-rank=1", "--rdzv-endpoint", "node0:2000"), {}, 1, "--node-rank"),
        (STATIC, {"PET_NODE_RANK": "1"}, 1, "PET_NODE_RANK"),
        ((), {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "node0", "PET_MASTER_PORT": "2000"}, 1,
         "PET_NODE_RANK"),
        (STATIC, {"JOB_COMPLETION_INDEX": "1"}, 1, "JOB_COMPLETION_INDEX"),
        (STATIC, {"SLURM_NNODES": "2", "SLURM_NODEID": "1"}, 1, "SLURM_NODEID"),
        (STATIC, {"SLURM_NNODES": "1", "SLURM_NODEID": "0"}, None, ""),
        (("--nnodes", "2", "--rdzv-backend=c10d", "--rdzv-endpoint", "node0:2000"), {}, None, ""),
        (("--nnodes", "2", "--master-port", "2000"),
         {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node[0-1]"}, 0, "SLURM_NODEID"),
    ],
)  # fmt: skip
def test_the_rank_of_a_node_and_its_master_are_found(
    arguments: tuple[str, ...], variables: dict[str, str], rank: int | None, source: str
) -> None:
    assert job(*arguments, **variables).where == Machines(
        nodes=2, node_rank=rank, node_rank_from=source, master_addr="node0", master_port=2000
    )


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-006,9],login1", "gpu003"), ("a,b", "a"), ("rack1-[7,9]-x,b", "rack1-7-x"), ("gpu12", "gpu12")],
)
def test_the_first_node_of_a_slurm_job_is_the_master(nodes: str, first: str) -> None:
    found = job("--nodes=2", SLURM_NNODES="2", SLURM_NODEID="1", SLURM_JOB_NODELIST=nodes).where
    assert (found.master_addr, found.master_port) == (first, 29500)


def test_how_long_nodes_wait_for_each_other_can_be_said() -> None:
    for name in ("timeout", "join_timeout"):
        found = job(*STATIC, "--rdzv-conf", f"{name}=30").where
        assert isinstance(found, Machines)
        assert found.join_timeout_s == 30


def test_a_script_that_is_not_there_is_refused() -> None:
    with pytest.raises(ScriptRefused, match="there is no file nowhere"):
        script_job(["nowhere.py"], {})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.py"], True),
        (["--workers", "2", "train.py", "job.yaml"], True),
        (["-m", "package.train"], True),
        (["--no-python", "job.yaml"], True),
        (["--wrokers", "2", "train.py"], True),
        (["job.yaml"], False),
        (["--name", "train.py", "job.yaml"], False),
        (["--set", "workers=2", "job.yml"], False),
        (["--nam", "wide", "job.yaml"], False),
        (["--help"], False),
        ([], False),
    ],
)
def test_a_job_file_is_told_from_a_script(arguments: list[str], expected: bool) -> None:
    assert is_script(arguments) is expected

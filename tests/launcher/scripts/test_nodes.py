"""Scripts on several nodes: on this machine, and on machines that meet, which are processes of this one here."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launcher.scripts.conftest import EVERMESH, Launcher
from tests.launcher.scripts.test_scripts import DIFFERENT, DUMP, RESTARTS, TORCHRUN, TRAIN, WAIT, dumped
from tests.processes import still_alive

OWN = {
    "EVERMESH_GENERATION",
    "EVERMESH_PROGRESS_FILE",
    "EVERMESH_RESTART_REASON",
    "EVERMESH_RINGS",
    "XDG_STATE_HOME",
}


def addresses(port: int, node_rank: int, nodes: int = 2) -> list[str]:
    return [
        *("--nnodes", str(nodes), "--node-rank", str(node_rank)),
        *("--master-addr", "localhost", "--master-port", str(port)),
    ]


def ended(process: "subprocess.Popen[str]", timeout_s: float = 60) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    output, errors = process.communicate(timeout=timeout_s)
    return process.returncode, output, errors


def test_the_environment_on_two_machines_is_torchruns(launcher: Launcher, port: int) -> None:
    script = launcher.script(DUMP)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for name, command in (("ours", EVERMESH), ("theirs", TORCHRUN)):
        (launcher.folder / name).mkdir()
        nodes = [
            subprocess.Popen(
                [*command, *addresses(port, rank), "--nproc-per-node", "2", "--role", "trainer", script, name],
                cwd=launcher.folder,
                env=environment | launcher.variables,
                stderr=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        assert [node.wait(60) for node in nodes] == [0, 0]
    for ours, theirs in zip(dumped(launcher.folder / "ours", 4), dumped(launcher.folder / "theirs", 4), strict=True):
        assert set(ours) - OWN == set(theirs) - OWN
        assert {name for name in theirs if ours[name] != theirs[name]} <= set(DIFFERENT) - {"MASTER_PORT"}


def test_two_nodes_here_find_what_two_machines_find(launcher: Launcher, port: int) -> None:
    script = launcher.script(DUMP)
    for name in ("here", "there"):
        (launcher.folder / name).mkdir()
    assert launcher.run("--nodes", "2", "--workers", "2", script, "here").returncode == 0
    machines = [launcher.start(*addresses(port, rank), "--workers", "2", script, "there") for rank in range(2)]
    assert [ended(machine)[0] for machine in machines] == [0, 0]
    different = {"EVERMESH_PROGRESS_FILE", "EVERMESH_RINGS", *DIFFERENT}
    for here, there in zip(dumped(launcher.folder / "here", 4), dumped(launcher.folder / "there", 4), strict=True):
        assert set(here) == set(there)
        assert {name for name in here if here[name] != there[name]} <= different


def test_the_output_of_nodes_here_is_in_a_folder_each_and_carries_its_rank(launcher: Launcher) -> None:
    done = launcher.run("--nodes", "2", "--workers", "2", "--tee", "1:1", "--no-python", "sh", "-c", "echo $LOCAL_RANK")
    assert sorted(done.stdout.splitlines()) == ["[0] 0", "[1] 1", "[3] 1"]
    logs = {str(path.relative_to(launcher.logs)) for path in launcher.logs.glob("node_*/*/*")}
    assert logs == {f"node_{node}/attempt_0/{local_rank}" for node in range(2) for local_rank in range(2)}


def test_a_failure_on_one_node_here_starts_all_nodes_again(launcher: Launcher) -> None:
    script = launcher.script("""
        import os, signal, time
        if os.environ["EVERMESH_GENERATION"] == "0":
            if os.environ["RANK"] == "3":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        print(os.environ["GROUP_RANK"], os.environ["EVERMESH_RESTART_REASON"])
    """)
    done = launcher.run("--nodes", "2", "--workers", "2", "--max-restarts", "1", "--tee", "1", script)
    assert done.returncode == 0, done.stderr
    reason = "rank 3 was killed by SIGKILL; restart 1 of 1"
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] {rank // 2} {reason}" for rank in range(4)]


def test_a_launcher_of_two_nodes_that_is_killed_leaves_no_process(launcher: Launcher) -> None:
    process = launcher.start("--nodes", "2", launcher.script(WAIT))
    launcher.wait_for("ready-0", "ready-1")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 6  # a rank, its child and a guardian for each node
    process.kill()
    assert still_alive(family, 2) == []


def test_machines_with_different_numbers_of_ranks_count_through(launcher: Launcher, port: int) -> None:
    script = launcher.script("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'])")
    machines = [
        launcher.start(*addresses(port, rank, nodes=3), "--workers", workers, "--tee", "3", script)
        for rank, workers in enumerate(("1", "2", "1"))
    ]
    outputs = [ended(machine)[1].splitlines() for machine in machines]
    assert [sorted(lines) for lines in outputs] == [["0 4"], ["[1] 1 4", "[2] 2 4"], ["3 4"]]


def test_without_node_ranks_the_machines_number_themselves(launcher: Launcher, port: int) -> None:
    script = launcher.script("import os; print(os.environ['GROUP_RANK'])")
    flags = ("--nnodes", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", script)
    outputs = [ended(machine)[1] for machine in [launcher.start(*flags) for _ in range(3)]]
    assert sorted(outputs) == ["0\n", "1\n", "2\n"]


def test_after_kill_9_on_one_machine_both_start_again_and_train_to_the_end(launcher: Launcher, port: int) -> None:
    script = launcher.script(TRAIN)
    machines = [launcher.start(*addresses(port, rank), "--max-restarts", "1", script, "die") for rank in range(2)]
    reason = "rank 1 was killed by SIGKILL; restart 1 of 1"
    for machine in machines:
        code, output, errors = ended(machine)
        assert (code, output) == (0, f"trained, restart 1 1 {reason}\n"), errors


def test_generations_of_two_machines_never_overlap(launcher: Launcher, port: int) -> None:
    script = launcher.script("""
        import os, signal, socket, sys
        from pathlib import Path
        rank, generation = int(os.environ["RANK"]), int(os.environ["EVERMESH_GENERATION"])
        for earlier in Path().glob(f"pid-{generation - 1}-*"):
            pid = earlier.read_text()
            if pid and Path("/proc", pid).exists():  # a rank may be ended before it has written
                Path("overlap").write_text(f"{earlier} {pid}")
        Path(f"pid-{generation}-{rank}").write_text(str(os.getpid()))
        Path(os.environ["EVERMESH_PROGRESS_FILE"]).write_text(str(generation))
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if rank == 0:
            server = socket.create_server(address)
            peers = [server.accept()[0] for _ in range(3)]
            said = {peer.recv(9) for peer in peers}  # nothing, if it is ended already
            if said - {b"", str(generation).encode()}:
                Path("overlap").write_text(str(said))
        else:
            while True:
                try:
                    peer = socket.create_connection(address)
                    break
                except ConnectionRefusedError:
                    pass
            peer.sendall(str(generation).encode())
        if generation < int(sys.argv[1]) and rank == generation % 4:
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    flags = ("--workers", "2", "--max-restarts", "100000", script, str(RESTARTS))
    machines = [launcher.start(*addresses(port, rank), *flags) for rank in range(2)]
    for machine in machines:
        code, _, errors = ended(machine, timeout_s=30 + 2 * RESTARTS)
        assert code == 0, errors
    assert not (launcher.folder / "overlap").exists()
    seen = {int(path.name.split("-")[1]) for path in launcher.folder.glob("pid-*")}
    assert seen == set(range(RESTARTS + 1))


def test_every_machine_tells_whose_failure_it_was(launcher: Launcher, port: int) -> None:
    script = launcher.script("""
        import os, time
        if os.environ["RANK"] == "1":
            raise ValueError("no data at all")
        time.sleep(60)
    """)
    for machine in [launcher.start(*addresses(port, rank), script) for rank in range(2)]:
        code, _, errors = ended(machine)
        assert code == 1
        assert "rank 1 failed with exit code 1 (ValueError: no data at all) in generation 0 on node 1" in errors
        assert errors.endswith("\nValueError: no data at all\n")
        assert errors.count("Traceback") == 1


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_is_lost_ends_the_others_with_75(launcher: Launcher, port: int, lost: int) -> None:
    script = launcher.script(WAIT)
    machines = [launcher.start(*addresses(port, rank), "--max-restarts", "3", script) for rank in range(2)]
    launcher.wait_for("ready-0", "ready-1")
    family = [child for machine in machines for child in psutil.Process(machine.pid).children(recursive=True)]
    machines[lost].kill()
    code, _, errors = ended(machines[1 - lost])
    assert code == 75
    assert f"evermesh: lost: node {lost}" in errors
    assert still_alive(family, 2) == []


def test_a_signal_to_one_machine_ends_all(launcher: Launcher, port: int) -> None:
    script = launcher.script(WAIT)
    machines = [launcher.start(*addresses(port, rank), script) for rank in range(2)]
    launcher.wait_for("ready-0", "ready-1")
    machines[1].send_signal(signal.SIGTERM)
    assert [ended(machine)[0] for machine in machines] == [143, 143]
    launcher.wait_for("SIGTERM-0", "SIGTERM-1")


def test_a_signal_to_every_machine_is_one_and_a_second_kills_all(launcher: Launcher, port: int) -> None:
    script = launcher.script(WAIT)
    machines = [launcher.start(*addresses(port, rank), script, "deaf") for rank in range(2)]
    launcher.wait_for("ready-0", "ready-1")
    for machine in machines:
        machine.send_signal(signal.SIGTERM)
    launcher.wait_for("SIGTERM-0", "SIGTERM-1")
    time.sleep(0.3)
    assert [machine.poll() for machine in machines] == [None, None]
    machines[0].send_signal(signal.SIGTERM)
    assert [ended(machine, timeout_s=5)[0] for machine in machines] == [143, 143]


def test_who_does_not_belong_is_refused_and_the_others_meet_all_the_same(launcher: Launcher, port: int) -> None:
    script = launcher.script("print('ran')")
    host = launcher.start(*addresses(port, 0), script)
    wrong = launcher.start(*addresses(port, 1, nodes=3), script)
    code, _, errors = ended(wrong)
    assert code == 2
    assert "refuses: node 0 was started with --nnodes 2, this one with 3" in errors
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(1) == b""
    code, _, errors = ended(launcher.start(*addresses(port, 1), "--rdzv-id", "other", script))
    assert "another job is at this address: its --rdzv-id is None, not other" in errors
    guest = launcher.start(*addresses(port, 1), script)
    assert [ended(machine)[:2] for machine in (host, guest)] == [(0, "ran\n"), (0, "ran\n")]


def test_a_machine_that_does_not_come_is_waited_for_as_long_as_was_said(launcher: Launcher, port: int) -> None:
    script, patience = launcher.script("print('ran')"), ("--rdzv-conf", "join_timeout=1")
    for rank, text in ((0, "1 of 2 nodes came to"), (1, "node 0 was not, or not with all nodes, at")):
        done = launcher.run(*addresses(port, rank), *patience, script)
        assert done.returncode == 1
        assert f"{text} localhost:{port} within 1 s. Start the same command on every machine" in done.stderr
        assert done.stdout == ""


def test_a_port_that_is_taken_is_an_error_with_the_way_out(launcher: Launcher, port: int) -> None:
    with socket.create_server(("", port)):
        done = launcher.run(*addresses(port, 0), launcher.script(""))
    assert done.returncode == 2
    assert f"port {port} cannot be opened here (Address already in use). Give another --master-port" in done.stderr


def test_slurm_says_which_node_this_is(launcher: Launcher, port: int) -> None:
    script = launcher.script("import os; print(os.environ['GROUP_RANK'], os.environ['MASTER_ADDR'])")
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost,elsewhere"}
    flags = ("--nnodes", "2", "--master-port", str(port), script)
    machines = [launcher.start(*flags, **slurm, SLURM_NODEID=str(rank)) for rank in range(2)]
    for rank, machine in enumerate(machines):
        code, output, errors = ended(machine)
        assert (code, output) == (0, f"{rank} localhost\n")
        assert f"node {rank} (SLURM_NODEID) of 2; waiting at localhost:{port}" in errors


def test_a_running_script_is_found_by_its_pid(launcher: Launcher) -> None:
    process = launcher.start("--workers", "2", launcher.script(WAIT))
    launcher.wait_for("ready-0", "ready-1")
    code = "from evermesh.launcher import registry; (e,) = registry.living(); print(e.kind, e.name, e.pid, e.directory)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | launcher.variables, capture_output=True, text=True, check=True
    )
    assert found.stdout == f"script script.py {process.pid} {launcher.logs}\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert not list(Path(launcher.variables["XDG_STATE_HOME"], "evermesh/jobs").iterdir())

"""Real scripts in real processes, next to torchrun where there is something to compare."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from evermesh.fault import read_events
from tests.launcher.scripts.conftest import EVERMESH, Launcher
from tests.processes import still_alive

RESTARTS = int(os.environ.get("EVERMESH_TEST_RESTARTS", "20"))
"""``make test-launcher EVERMESH_TEST_RESTARTS=200`` for the long one."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DIFFERENT = {
    "MASTER_PORT": "a free one",
    "TORCHELASTIC_RUN_ID": "made up",
    "TORCHELASTIC_ERROR_FILE": "in another folder",
    "TORCHELASTIC_USE_AGENT_STORE": "rank 0 hosts the store, and not the agent",
}
"""Variables of torchrun whose values need not be ours, and why."""

DUMP = """
    import json, os, sys
    from pathlib import Path
    Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(dict(os.environ)))
"""

TRAIN = """
    import os, signal, sys
    from pathlib import Path
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")  # env://
    assert dist.get_world_size() == 2
    torch.manual_seed(dist.get_rank())  # different weights, until rank 0 sends its own
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    count, first = os.environ["TORCHELASTIC_RESTART_COUNT"], None
    for step in range(6):
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 4)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
        if step == 2 and count == "0" and dist.get_rank() == 1 and "die" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and dist.get_rank() == 1 and "raise" in sys.argv:
            raise KeyError("no such thing")
    assert loss.item() < first
    print("trained, restart", count, os.environ["EVERMESH_GENERATION"], os.environ["EVERMESH_RESTART_REASON"])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # under load torch 2.13 aborts now and then when gloo ends with the interpreter, whoever launched it
"""

RAISE = """
    import os, time
    print("first words of", os.environ["RANK"])
    if os.environ["RANK"] == "1":
        raise ValueError("no data at all")
    time.sleep(60)
"""

WAIT = """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    rank = os.environ["RANK"]
    def note(number, frame):
        Path(f"{signal.Signals(number).name}-{rank}").write_text(str(time.monotonic()))
        if number == signal.SIGTERM and "deaf" not in sys.argv:
            sys.exit(0)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, note)
    child = subprocess.Popen(["sleep", "60"])
    Path(f"ready-{rank}").write_text(str(child.pid))
    while True:
        time.sleep(0.01)
"""


def dumped(folder: Path, ranks: int) -> list[dict[str, str]]:
    return [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]


def test_the_environment_of_every_rank_is_torchruns_and_ours(launcher: Launcher) -> None:
    script = launcher.script(DUMP)
    found: dict[str, list[dict[str, str]]] = {}
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    flags = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "--role", "trainer"]
    for name, command in (("ours", EVERMESH), ("theirs", TORCHRUN)):
        (launcher.folder / name).mkdir()
        command = [*command, *flags, script, name]
        subprocess.run(command, cwd=launcher.folder, env=environment, check=True, capture_output=True)
        found[name] = dumped(launcher.folder / name, 2)
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        own = {"EVERMESH_GENERATION", "EVERMESH_RESTART_REASON", "EVERMESH_PROGRESS_FILE", "EVERMESH_RINGS"}
        assert set(ours) - own == set(theirs)
        assert {name for name in theirs if ours[name] != theirs[name]} <= set(DIFFERENT)
        assert ours["OMP_NUM_THREADS"] == "1"


def test_two_ranks_train_with_ddp_over_gloo(launcher: Launcher) -> None:
    done = launcher.run("--workers", "2", launcher.script(TRAIN))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trained, restart 0 0 \n"
    assert (launcher.logs / "attempt_0/1/stdout.log").read_text() == done.stdout


def test_after_kill_9_of_one_rank_all_meet_in_a_new_store_and_finish(launcher: Launcher) -> None:
    done = launcher.run("--workers", "2", "--max-restarts", "2", launcher.script(TRAIN), "die")
    assert done.returncode == 0, done.stderr
    reason = "rank 1 was killed by SIGKILL; restart 1 of 2"
    assert done.stdout == f"trained, restart 1 1 {reason}\n"
    events = list(read_events(launcher.logs / "events.jsonl"))
    assert [event.kind for event in events] == ["started", "died", "restarted", "started", "finished"]
    assert events[1].fields == {"rank": 1, "code": -9}


def test_the_rank_that_raised_is_told_and_not_the_one_that_lost_it(launcher: Launcher) -> None:
    done = launcher.run("--workers", "2", launcher.script(TRAIN), "raise")
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'no such thing'\n")
    assert done.stderr.count("Traceback") == 1


def test_an_exception_without_restarts_ends_with_1_and_its_traceback_is_last(launcher: Launcher) -> None:
    done = launcher.run("--workers", "2", launcher.script(RAISE))
    assert done.returncode == 1
    assert done.stdout == "first words of 0\n"
    before, _, traceback = done.stderr.partition("Traceback (most recent call last):\n")
    assert (
        f"rank 1 failed with exit code 1 (ValueError: no data at all) in generation 0. Its logs: {launcher.logs}"
        in before
    )
    assert traceback.endswith("\nValueError: no data at all\n")


def test_what_record_wrote_is_told_rather_than_the_log(launcher: Launcher) -> None:
    script = """
        import json, os, sys
        inner = {"extraInfo": {"py_callstack": "Traceback (most recent call last):\\nOSError: from the file"}}
        json.dump({"message": inner}, open(os.environ["TORCHELASTIC_ERROR_FILE"], "w"))
        sys.exit("noise")
    """
    done = launcher.run(launcher.script(script))
    assert done.returncode == 1
    assert done.stderr.endswith("\nTraceback (most recent call last):\nOSError: from the file\n")


def test_an_abort_after_an_exception_does_not_hide_it(launcher: Launcher) -> None:
    script = """
        import atexit, os, sys
        def end():
            sys.stderr.write("terminate called without an active exception\\n")
            os.abort()
        atexit.register(end)
        raise KeyError("cause")
    """
    done = launcher.run(launcher.script(script))
    assert "rank 0 was killed by SIGABRT (KeyError: 'cause') in generation 0" in done.stderr
    assert done.stderr.endswith("\nKeyError: 'cause'\n")


def test_the_same_exception_again_and_again_stops_after_3_generations_with_93(launcher: Launcher) -> None:
    done = launcher.run("--workers", "2", "--max-restarts", "50", launcher.script(RAISE))
    assert done.returncode == 93
    assert sorted(path.name for path in launcher.logs.glob("attempt_*")) == ["attempt_0", "attempt_1", "attempt_2"]
    assert "3 attempts in a row made no progress and failed with the same traceback" in done.stderr
    assert done.stderr.endswith("\nValueError: no data at all\n")
    assert done.stderr.count("Traceback") == 1


@pytest.mark.parametrize("code", [75, 93])
def test_the_codes_of_the_queue_pass_through(launcher: Launcher, code: int) -> None:
    done = launcher.run("--workers", "2", "--max-restarts", "5", "--no-python", "sh", "-c", f"exit {code}")
    assert done.returncode == code
    assert len(list(launcher.logs.glob("attempt_*"))) == 1


def test_sigterm_is_forwarded_at_once_and_ends_with_143(launcher: Launcher) -> None:
    process = launcher.start("--workers", "2", launcher.script(WAIT))
    launcher.wait_for("ready-0", "ready-1")
    family = psutil.Process(process.pid).children(recursive=True)
    sent_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    heard_s = [float((launcher.folder / f"SIGTERM-{rank}").read_text()) for rank in range(2)]
    assert max(heard_s) - sent_s < 1  # 0.1 on an idle machine
    assert still_alive(family, 1) == []


def test_a_script_that_saves_on_a_signal_and_asks_for_a_requeue_gets_it(launcher: Launcher) -> None:
    script = """
        import os, signal, sys, time
        from pathlib import Path
        signal.signal(signal.SIGUSR1, lambda *_: Path("warned-" + os.environ["RANK"]).touch())
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        Path("ready-" + os.environ["RANK"]).touch()
        time.sleep(60)
    """
    process = launcher.start("--workers", "2", "--max-restarts", "5", launcher.script(script))
    launcher.wait_for("ready-0", "ready-1")
    process.send_signal(signal.SIGUSR1)  # as Slurm does some time before the end
    launcher.wait_for("warned-0", "warned-1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75


def test_who_does_not_end_in_time_is_killed_even_when_it_is_stopped(launcher: Launcher) -> None:
    process = launcher.start("--workers", "2", "--grace", "0.5", launcher.script(WAIT), "deaf")
    launcher.wait_for("ready-0", "ready-1")
    family = psutil.Process(process.pid).children(recursive=True)
    psutil.Process(ready(launcher, 1)).parent().suspend()  # type: ignore[union-attr]
    sent_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert 0.5 <= time.monotonic() - sent_s < 3
    assert still_alive(family, 1) == []


def test_a_second_signal_kills_at_once(launcher: Launcher) -> None:
    process = launcher.start(launcher.script(WAIT), "deaf")
    launcher.wait_for("ready-0")
    process.send_signal(signal.SIGTERM)
    launcher.wait_for("SIGTERM-0")
    process.send_signal(signal.SIGINT)
    assert process.wait(3) == 143


def test_other_signals_are_forwarded_and_end_nothing(launcher: Launcher) -> None:
    process = launcher.start("--workers", "2", launcher.script(WAIT))
    launcher.wait_for("ready-0", "ready-1")
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        process.send_signal(number)
        launcher.wait_for(f"{number.name}-0", f"{number.name}-1")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143


def test_a_launcher_killed_with_sigkill_leaves_no_process_after_2_s(launcher: Launcher) -> None:
    process = launcher.start("--workers", "2", launcher.script(WAIT))
    launcher.wait_for("ready-0", "ready-1")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 5  # two ranks, a child of each, the guardian
    process.kill()
    assert still_alive(family, 2) == []


def test_a_death_is_noticed_at_once(launcher: Launcher) -> None:
    script = """
        import os, signal, time
        from pathlib import Path
        Path("killed-" + os.environ["EVERMESH_GENERATION"]).write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    launcher.run("--max-restarts", "5", launcher.script(script))
    noticed_s = [event.time_s for event in read_events(launcher.logs / "events.jsonl") if event.kind == "died"]
    killed_s = [float((launcher.folder / f"killed-{generation}").read_text()) for generation in range(3)]
    delays_s = [after - before for before, after in zip(killed_s, noticed_s, strict=True)]
    assert min(delays_s) < 1, delays_s  # 0.02 on an idle machine


def test_restarts_in_a_row_never_hang(launcher: Launcher) -> None:
    script = """
        import os, signal, socket, sys
        from pathlib import Path
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if os.environ["RANK"] == "0":
            server = socket.create_server(address)  # sets SO_REUSEADDR, as torch's store does
            server.accept()[0].recv(1)
        else:
            while True:
                try:
                    peer = socket.create_connection(address)
                    break
                except ConnectionRefusedError:
                    pass
            Path(os.environ["EVERMESH_PROGRESS_FILE"]).write_text(os.environ["EVERMESH_GENERATION"])
            if os.environ["EVERMESH_GENERATION"] != sys.argv[1]:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    arguments = ("--workers", "2", "--max-restarts", "100000", launcher.script(script), str(RESTARTS))
    done = launcher.run(*arguments, timeout_s=20 + RESTARTS)
    assert done.returncode == 0, done.stderr
    assert len(list(launcher.logs.glob("attempt_*"))) == RESTARTS + 1


def test_lines_carry_their_rank_when_several_ranks_print(launcher: Launcher) -> None:
    done = launcher.run("--workers", "2", "--tee", "1", "--no-python", "sh", "-c", "printf 'a\\nb'; echo hidden >&2")
    assert sorted(done.stdout.splitlines()) == ["[0] a", "[0] b", "[1] a", "[1] b"]
    assert done.stderr.count("hidden") == 1  # rank 0's errors are shown anyway
    assert (launcher.logs / "attempt_0/1/stderr.log").read_text() == "hidden\n"


def test_a_module_is_run_with_its_arguments(launcher: Launcher) -> None:
    launcher.script("import sys; print(__name__, sys.argv[1:])", "training.py")
    assert launcher.run("-m", "training", "--lr", "3").stdout == "__main__ ['--lr', '3']\n"


def test_variables_stand_for_flags(launcher: Launcher) -> None:
    done = launcher.run("sh", "-c", "echo $WORLD_SIZE", PET_NO_PYTHON="1", PET_NPROC_PER_NODE="3", PET_LOCAL_ADDR="me")
    assert done.stdout == "3\n"
    assert "evermesh: accepted, without effect here: PET_LOCAL_ADDR\n" in done.stderr


def test_an_unknown_flag_is_an_error_with_the_closest_one(launcher: Launcher) -> None:
    done = launcher.run("--max-restart", "2", launcher.script(""))
    assert done.returncode == 2
    assert "error: there is no flag --max-restart. Did you mean --max-restarts?" in done.stderr
    assert not (launcher.folder / "logs").exists()


def test_a_reader_that_goes_away_ends_nothing(launcher: Launcher) -> None:
    script = launcher.script("for n in range(20000): print(n)\nopen('end', 'w')")
    process = launcher.start(script)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 0
    assert (launcher.folder / "end").exists()


def ready(launcher: Launcher, rank: int) -> int:
    """The number of the child of a rank."""
    return int((launcher.folder / f"ready-{rank}").read_text())

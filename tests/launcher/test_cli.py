"""The command line: help with examples, errors without traceback, exit codes, and a fast start."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evermesh.launcher import Run, load_job
from evermesh.launcher.commands.app import app

EVERMESH = [sys.executable, "-c", "from evermesh.launcher.cli import main; main()"]


def evermesh(*arguments: str | Path, width: int = 200) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {**os.environ, "COLUMNS": str(width), "NO_COLOR": "1"}
    return subprocess.run(
        [*EVERMESH, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )


def help_of(command: list[str], width: int = 200) -> str:
    """What ``--help`` shows, asked in this process."""
    found = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(width), "NO_COLOR": "1"})
    assert found.exit_code == 0
    return found.output


def test_the_command_line_starts_without_torch_and_other_slow_imports() -> None:
    slow = ["torch", "tokenizers", "matplotlib", "plotext", "pyarrow"]
    program = f"import sys, evermesh.launcher.cli; print([name for name in {slow} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ([], "evermesh launch deploy/jobs/quickstart.yaml"),
        (["launch"], "evermesh launch deploy/jobs/quickstart.yaml"),
        (["resume"], "evermesh resume quickstart --workers 3"),
        (["deploy"], "evermesh deploy slurm job.yaml --time 24:00:00 --output out"),
        (["runs"], "evermesh runs --runs /data/runs --json"),
        (["plan"], "evermesh plan lengths.txt.gz --workers 64 --capacity 32768"),
        (["simulate"], "evermesh simulate lengths.txt.gz --hdp 64 --ranks-per-node 8 --slow 5=0.7"),
        (["layout"], "evermesh layout model.yaml --nodes 16 --context 8192"),
        (["checkpoint"], "evermesh checkpoint verify runs/quickstart"),
        (["checkpoint", "ls"], "evermesh checkpoint ls quickstart"),
        (["checkpoint", "show"], "evermesh checkpoint show runs/quickstart"),
        (["checkpoint", "verify"], "evermesh checkpoint verify quickstart"),
        (["checkpoint", "prune"], "evermesh checkpoint prune quickstart --keep-last 3 --keep-every 1000 --yes"),
        (["checkpoint", "diff"], "evermesh checkpoint diff quickstart out/zero3"),
        (
            ["checkpoint", "extract"],
            "evermesh checkpoint extract quickstart --tensor 'parameter.*' weights.safetensors",
        ),
        (["checkpoint", "plan-load"], "evermesh checkpoint plan-load out/zero3 --ranks 64"),
        (["checkpoint", "convert"], "evermesh checkpoint convert quickstart new --to torch-distributed"),
        (["checkpoint", "export"], "evermesh export quickstart models/quickstart"),
        (["export"], "evermesh export quickstart models/quickstart"),
        (["snapshot"], "evermesh snapshot plan --nodes 128 --per-rack 8 --code 6+2"),
        (["snapshot", "plan"], "evermesh snapshot plan --topology cluster.json --must-survive rack --json"),
        (["traffic"], "evermesh traffic plan job.yaml --topology cluster.yaml"),
        (["traffic", "plan"], "evermesh traffic plan job.yaml --topology cluster.yaml --failed leaf0-spine3"),
        (["data"], "evermesh data stats stdlib"),
        (["data", "prepare"], "evermesh data prepare texts/ --output corpora/mine --vocabulary 8192"),
        (["data", "stats"], "evermesh data stats corpora/mine --context 4096"),
        (["demo"], "evermesh demo"),
        (["chaos"], "evermesh chaos job.yaml --schedule faults.yaml --compare"),
        (["status"], "evermesh status quickstart --json"),
        (["top"], "evermesh top quickstart --once"),
        (["logs"], "evermesh logs quickstart --rank 2"),
        (["nodes"], "evermesh nodes quickstart --json"),
        (["dashboard"], "evermesh dashboard quickstart"),
        (["stop"], "evermesh stop quickstart --grace 60"),
    ],
)
def test_help_shows_an_example(command: list[str], example: str) -> None:
    assert example in help_of(command)


@pytest.mark.parametrize(
    "command",
    [
        "launch",
        "resume",
        "chaos",
        "plan",
        "simulate",
        "layout",
        "checkpoint show",
        "checkpoint prune",
        "data prepare",
        "traffic plan",
        "status",
        "top",
        "logs",
        "dashboard",
        "stop",
    ],
)
def test_examples_are_not_folded_on_a_terminal_of_80_columns(command: str) -> None:
    narrow, wide = (help_of(command.split(), width).partition("Example")[2].splitlines() for width in (80, 200))
    assert [line.strip() for line in narrow] == [line.strip() for line in wide]


def test_the_version_is_that_of_the_package() -> None:
    from evermesh import __version__

    assert evermesh("--version").stdout == f"evermesh {__version__}\n"


def test_a_bad_job_ends_with_2_and_one_line_without_traceback(job_file: Path) -> None:
    found = evermesh("launch", job_file, "--set", "train.stesp=3")
    assert found.returncode == 2
    assert found.stderr == "error: --set train.stesp=3: train.stesp is not a key. Did you mean train.steps?\n"
    assert not (job_file.parent / "runs").exists()


def test_workers_that_cannot_hold_the_longest_sequence_are_refused_before_anything_starts(job_file: Path) -> None:
    found = evermesh("launch", job_file, "--set", "workers=1")
    assert found.returncode == 2
    assert (
        "the data has sequences of 256 tokens, but 1 HDP ranks with a capacity of 160 tokens hold 160" in found.stderr
    )
    assert "Set train.layout.capacity to at least 256" in found.stderr
    assert not (job_file.parent / "runs").exists()


def test_resume_without_a_run_says_how_to_start_one(tmp_path: Path) -> None:
    found = evermesh("resume", "--runs", tmp_path)
    assert found.returncode == 2
    assert "there is no run in" in found.stderr


def test_runs_of_an_empty_folder_say_how_to_start_one(tmp_path: Path) -> None:
    assert "Start one with: evermesh launch" in evermesh("runs", "--runs", tmp_path).stdout
    assert json.loads(evermesh("runs", "--runs", tmp_path, "--json").stdout) == []


def test_plan_of_a_job_draws_a_row_per_rank_and_its_certificate(job_file: Path, tmp_path: Path) -> None:
    found = evermesh("plan", job_file, "--batch", "2", "--workers", "3", "--png", tmp_path / "plan.png")
    assert found.returncode == 0
    assert [f"rank {rank} " in found.stdout for rank in range(4)] == [True, True, True, False]
    assert "makespan" in found.stdout
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_plan_of_a_list_of_lengths_is_a_batch_plan_in_json(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt.gz").write_bytes(gzip.compress(b"# tokens\n900\n\n100\n100 # short\n"))
    found = evermesh("plan", tmp_path / "lengths.txt.gz", "--workers", "4", "--capacity", "300", "--json", "-")
    plan = json.loads(found.stdout)
    assert plan["lengths"] == [900, 100, 100]
    assert len(plan["ranks"]) == 4


def test_a_wrong_length_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("900\nmany\n")
    found = evermesh("plan", tmp_path / "lengths.txt")
    assert found.returncode == 2
    assert "lengths.txt:2: 'many' is not a length. Write one positive integer per line." in found.stderr


def test_data_stats_shows_lengths_of_a_corpus(corpus: Path) -> None:
    found = evermesh("data", "stats", corpus, "--context", "256")
    assert "60 documents" in found.stdout
    assert json.loads(evermesh("data", "stats", corpus, "--json").stdout)["documents"] == 60


def test_data_prepare_makes_a_corpus_and_refuses_to_overwrite_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "a ring of ranks " * 20}) + "\n")
    command: list[str | Path] = [
        "data",
        "prepare",
        tmp_path / "a.jsonl",
        "--output",
        tmp_path / "new",
        "--vocabulary",
        "300",
    ]
    first, second = (evermesh(*command, "--text-field", "body") for _ in range(2))
    assert first.returncode == 0
    assert "1 documents" in first.stdout
    assert second.returncode == 2
    assert "is there already" in second.stderr


def test_data_prepare_wants_one_tokenizer(tmp_path: Path) -> None:
    found = evermesh("data", "prepare", tmp_path, "--output", tmp_path / "new")
    assert found.returncode == 2
    assert "--vocabulary N" in found.stderr


def test_an_error_of_the_machine_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [*EVERMESH, "runs"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert found.returncode == 1
    assert found.stderr.splitlines()[0] == "error: [Errno 28] No space left on device"
    assert "Traceback" not in found.stderr


def test_a_mistyped_command_suggests_the_right_one() -> None:
    found = evermesh("lanch")
    assert found.returncode == 2
    assert "Did you mean 'launch'" in found.stderr


def test_runs_say_what_is_wrong_with_a_damaged_one(job_file: Path) -> None:
    run = Run.create(load_job(job_file))
    with (run.directory / "job.yaml").open("a") as file:
        file.write("zz: 3\n")
    found = evermesh("runs", "--runs", job_file.parent / "runs", width=60)
    assert found.returncode == 0
    assert "zz is not a key. Keys of a job" in found.stdout.splitlines()[-1]


def test_a_plan_has_an_exact_picture_name_and_refuses_numbers_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text("100\n200\n")
    assert evermesh("plan", tmp_path / "lengths", "--png", tmp_path / "picture").returncode == 0
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "lengths").write_text("9" * 5000)
    assert evermesh("plan", tmp_path / "lengths").returncode == 2

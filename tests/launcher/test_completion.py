"""Completion in a real bash, as `evermesh --show-completion` sets it up; zsh and fish by the same protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evermesh.launcher.commands.app import app
from evermesh.launcher.completion import tree as tree_module
from evermesh.launcher.completion.answering import complete
from evermesh.launcher.completion.tree import load_tree, make_tree
from evermesh.launcher.config import JobConfig
from tests.launcher.test_cli import EVERMESH

SCRIPT = """
source ./completion.sh
COMP_LINE="$1"; read -ra COMP_WORDS <<< "${1//=/ = }"
[[ "$1" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_evermesh_completion ./evermesh
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two runs, a job file, and ``evermesh`` as a program."""
    made = tmp_path_factory.mktemp("completion")
    (made / "evermesh").write_text(f"#!{sys.executable}\n{EVERMESH[-1]}\n")
    (made / "evermesh").chmod(0o755)
    for age, name in enumerate(("small", "wide")):
        (made / "runs" / name).mkdir(parents=True)
        (made / "runs" / name / "state.json").touch()
        os.utime(made / "runs" / name / "state.json", (1e9 + age, 1e9 + age))
        (made / "runs" / name / "job.yaml").write_text(f"name: {name}\nnodes: {1 + age}\nspares: 1\n")
    (made / "job.yaml").touch()
    (made / "notes.txt").touch()
    shown = made / "completion.sh"
    environment = os.environ | {"_EVERMESH_COMPLETE": "source_bash", "XDG_CACHE_HOME": str(made / "cache")}
    done = subprocess.run([str(made / "evermesh")], env=environment, capture_output=True, text=True, check=True)
    shown.write_text(done.stdout)
    return made


def bash(folder: Path, line: str) -> list[str]:
    """What bash would offer after ``line``."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        ["bash", "-c", SCRIPT, "bash", line], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return [word for word in done.stdout.splitlines() if word]


def test_bash_completes_commands_options_runs_jobs_nodes_and_keys(folder: Path) -> None:
    assert bash(folder, "evermesh res") == ["resume"]
    assert bash(folder, "evermesh checkpoint ver") == ["verify"]
    assert bash(folder, "evermesh resume --work") == ["--workers"]
    assert bash(folder, "evermesh resume ") == ["wide", "small"]
    assert bash(folder, "evermesh status sm") == ["small"]
    assert bash(folder, "evermesh report runs/w") == ["runs/wide"]
    assert bash(folder, "evermesh launch j") == ["job.yaml"]
    assert bash(folder, "evermesh drain ") == ["node-0", "node-1", "node-2"]
    assert bash(folder, "evermesh launch job.yaml --set train.step") == ["train.steps=", "train.steps=<int>"]
    assert {"train.layout.pp=", "train.layout.tp="} <= set(bash(folder, "evermesh launch job.yaml --set train.layout."))
    assert bash(folder, "evermesh launch job.yaml --set preflight=f") == ["full"]
    assert bash(folder, "evermesh relayout wide tp_ch") == ["tp_chunks=", "tp_chunks=<int>"]
    assert bash(folder, "evermesh launch --virtual") == ["--virtual-local-rank"]
    assert bash(folder, "evermesh launch notes") == []  # bash offers files then


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_the_same_with_help(folder: Path, shell: str) -> None:
    environment = os.environ | {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "_EVERMESH_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "evermesh launch job.yaml --set train.steps",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    command = [str(folder / "evermesh")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    expected = {
        "zsh": '_arguments \'*: :(("train.steps=":"int"\n"train.steps=<int>":"int"))\'\n',
        "fish": "train.steps=\tint\ntrain.steps=<int>\tint\n",
    }
    assert done.stdout == expected[shell]
    if shell == "fish":
        for line, code in (("evermesh launch notes", 1), ("evermesh res", 0)):
            asked = environment | {"_TYPER_COMPLETE_FISH_ACTION": "is-args", "_TYPER_COMPLETE_ARGS": line}
            assert subprocess.run(command, cwd=folder, env=asked, check=False).returncode == code


def test_every_command_and_every_key_of_a_job_is_in_the_tree() -> None:
    tree = make_tree()
    named = {command.name for command in app.registered_commands} | {
        group.typer_instance.info.name for group in app.registered_groups if group.typer_instance is not None
    }
    assert set(tree["commands"]) == named
    for key in ("workers", "train.steps", "train.layout.pp", "train.model.moe.experts", "hang.stopped_s", "topology"):
        assert key in tree["keys"]
    assert {key for key in tree["keys"] if "." not in key} == set(JobConfig.model_fields)
    assert tree["keys"]["record"] == ["bool", ["true", "false"]]
    found = [one.value for one in complete(tree, ["launch", "--set"], "record=")]
    assert found == ["record=true", "record=false"]


def test_the_tree_is_made_once_and_again_when_the_program_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load_tree()
    file = tmp_path / "evermesh/completion.json"
    file.write_text(json.dumps(first | {"help": "from the file"}))
    assert load_tree()["help"] == "from the file"
    monkeypatch.setattr(tree_module, "_key", lambda: "another")
    assert load_tree()["help"] == first["help"]
    file.write_text("torn")
    assert load_tree()["help"] == first["help"]


def test_an_answer_loads_neither_the_command_line_nor_the_model_of_jobs(folder: Path) -> None:
    bash(folder, "evermesh res")
    slow = ["torch", "typer", "pydantic", "rich", "numpy"]
    program = (
        "import sys; from evermesh.launcher.cli import main\n"
        f"try: main()\nfinally: print([name for name in {slow} if name in sys.modules])"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "_EVERMESH_COMPLETE": "complete_bash"}
    environment |= {"COMP_WORDS": "evermesh res", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "resume\n[]\n"

"""What may follow on a command line, for the scripts of ``evermesh --install-completion``: typer's, by its protocol."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from evermesh.launcher.completion.tree import Tree, load_tree

VARIABLE = "_EVERMESH_COMPLETE"
SHELLS = ("bash", "zsh", "fish")
_JOB_FILES = (".yaml", ".yml")


class Candidate(NamedTuple):
    """A word that may stand there."""

    value: str
    help: str = ""


def answer() -> int:
    """Print what may follow, as the shell asks for it; the exit code."""
    shell, tree = os.environ[VARIABLE].removeprefix("complete_"), load_tree()
    words, begun = _of_bash() if shell == "bash" else _of_others()
    found = list(complete(tree, words, begun))
    if shell == "bash":
        known = len(begun) - len(begun.rpartition("=")[2])  # bash replaces what follows the last =
        print("\n".join(one.value[known:] for one in found))
    elif shell == "zsh":
        print(f"_arguments '*: :(({chr(10).join(map(_for_zsh, found))}))'" if found else "_files")
    elif os.environ.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
        return 0 if found else 1
    else:
        print("\n".join(f"{one.value}\t{one.help}" if one.help else one.value for one in found))
    return 0


def complete(tree: Tree, words: Sequence[str], begun: str) -> Iterator[Candidate]:
    """What may stand at the end of ``words``, where ``begun`` does; nothing where that is a file of any kind."""
    here, number, awaited = tree, 0, None
    for word in words:
        if awaited is not None:
            awaited = None
        elif word.startswith("-"):
            name, equals, _ = word.partition("=")
            takes = here["options"].get(name, ["", "", []])
            awaited = takes if takes[1] and not equals else None
        elif word in here["commands"]:
            here = here["commands"][word]
        else:
            number += 1
    prefix, equals, value = begun.partition("=")
    if awaited is not None:
        found = _values(tree, awaited[1], awaited[2], begun)
    elif begun.startswith("-") and equals:
        takes = here["options"].get(prefix, ["", "", []])
        found = [one._replace(value=f"{prefix}={one.value}") for one in _values(tree, takes[1], takes[2], value)]
    elif begun.startswith("-"):
        found = [Candidate(name, told[0]) for name, told in here["options"].items()]
    elif here["commands"]:
        found = [Candidate(name, inner["help"]) for name, inner in here["commands"].items()]
    elif here["arguments"]:
        metavar, choices = here["arguments"][min(number, len(here["arguments"]) - 1)]
        found = _values(tree, metavar, choices, begun)
    else:
        found = []
    yield from (one for one in found if one.value.startswith(begun))


def _values(tree: Tree, metavar: str, choices: Sequence[str], begun: str) -> list[Candidate]:
    """Of an option or argument, by what its value is called."""
    if choices:
        return [Candidate(choice) for choice in choices]
    if metavar.startswith("KEY="):
        return list(_keys(tree, begun, below="train.layout." if metavar.endswith("...") else ""))
    kind = re.match(r"[A-Z]*", metavar.strip("["))
    makers = {"RUN": _runs, "NODE": _nodes, "JOB": _job_files}
    make = makers.get(kind[0] if kind else "")
    return list(make(begun)) if make is not None else []


def _keys(tree: Tree, begun: str, below: str) -> Iterator[Candidate]:
    """Keys of a job, or ``below`` one, each with its type; of the only one that is left its values, or else its type."""
    key = begun.partition("=")[0]
    keys = ((name.removeprefix(below), told) for name, told in tree["keys"].items() if name.startswith(below))
    found = {name: told for name, told in keys if name.startswith(key)}
    if key in found and "=" in begun:
        found = {key: found[key]}
    for name, (told, values) in found.items():
        if len(found) > 1:
            yield Candidate(f"{name}=", told)
        else:
            yield from (Candidate(f"{name}={value}", told) for value in values or ("", f"<{told}>"))


def _runs(begun: str) -> Iterator[Candidate]:
    """Runs below ``runs`` by name, or by directory where a path is begun; the newest first."""
    folder = Path(begun.rpartition("/")[0] or "/") if "/" in begun else Path("runs")
    found: list[tuple[float, str]] = []
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                found.append(((path / "state.json").stat().st_mtime, path.name))
    prefix = f"{begun.rpartition('/')[0]}/" if "/" in begun else ""
    for _, name in sorted(found, reverse=True):
        yield Candidate(f"{prefix}{name}", "run")


def _nodes(begun: str) -> Iterator[Candidate]:
    """Nodes of the newest run."""
    for name, _ in list(_runs(""))[:1]:
        with suppress(OSError):
            text = (Path("runs") / name / "job.yaml").read_text()
            counts = {key: int(number) for key, number in re.findall(r"^(nodes|spares): (\d+)$", text, re.MULTILINE)}
            for number in range(counts.get("nodes", 1) + counts.get("spares", 0)):
                yield Candidate(f"node-{number}", f"of {name}")


def _job_files(begun: str) -> Iterator[Candidate]:
    """Folders, and files that may be jobs; a script is a file of any kind, and left to the shell where no job is found."""
    folder = Path(begun.rpartition("/")[0] or ("/" if begun.startswith("/") else "."))
    prefix = begun[: len(begun) - len(begun.rpartition("/")[2])]
    with suppress(OSError):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        jobs = [entry.name for entry in entries if entry.name.endswith(_JOB_FILES)]
        others = [f"{entry.name}/" for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        for name in (*jobs, *others) if jobs or not begun else ():
            yield Candidate(f"{prefix}{name}", "job" if name.endswith(_JOB_FILES) else "")


def _of_bash() -> tuple[list[str], str]:
    """The words before the cursor, and what is begun there. bash makes words of every ``=``: they are put together again."""
    words = _split(os.environ.get("COMP_WORDS", ""))
    number = int(os.environ.get("COMP_CWORD", "0") or 0)
    joined: list[str] = []
    for word in [*words[1:number], words[number] if number < len(words) else ""]:
        if joined and (word == "=" or joined[-1].endswith("=")):
            joined[-1] += word
        else:
            joined.append(word)
    return joined[:-1], joined[-1]


def _of_others() -> tuple[list[str], str]:
    line = os.environ.get("_TYPER_COMPLETE_ARGS", "")
    words = _split(line)[1:]
    return (words, "") if line.endswith(" ") or not words else (words[:-1], words[-1])


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # a quote is still open
        return line.split()


def _for_zsh(one: Candidate) -> str:
    def escape(text: str) -> str:
        marks = {'"': '""', "'": "''", "$": "\\$", "`": "\\`", ":": r"\\:"}
        return "".join(marks.get(sign, sign) for sign in text)

    told = re.sub(r"\[/?[a-z]*\]", "", one.help)
    return f'"{escape(one.value)}":"{escape(told)}"' if told else f'"{escape(one.value)}"'

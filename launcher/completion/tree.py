"""All commands, their options, and the keys of a job, as plain values: made from the command line itself, and kept in a file
until the program changes. Making it takes a second; nothing of it is loaded when the file is there.
"""

import enum
import json
import os
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

Tree = dict[str, Any]
"""``commands``: trees by name. ``options``: by name [help, metavar of its value or "", choices]. ``arguments``: [metavar,
choices]. ``help``. At the top also ``keys``: by dotted key of a job [its type, values that can be listed]."""
_ROOT = Path(__file__).parents[2]
_SOURCES = ("launcher/commands/**/*.py", "launcher/scripts/flags.py", "launcher/completion/*.py", "*/**/config.py")


def load_tree() -> Tree:
    """The tree of this version of the program, from its file where that is up to date."""
    file, key = _file(), _key()
    with suppress(OSError, ValueError):
        kept: Tree = json.loads(file.read_text())
        if kept.get("key") == key:
            return kept
    made = make_tree() | {"key": key}
    with suppress(OSError):  # without a place to keep it, it is made every time
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_text(json.dumps(made))
        part.replace(file)
    return made


def make_tree() -> Tree:
    """Ask the command line and the model of jobs."""
    import typer.main

    from evermesh.launcher.commands.app import app
    from evermesh.launcher.config import JobConfig
    from evermesh.launcher.scripts.flags import FLAGS

    tree = _command(typer.main.get_command(app))
    of_scripts = {name: [flag.help, flag.metavar or "", []] for flag in FLAGS for name in flag.names}
    tree["commands"]["launch"]["options"] = of_scripts | tree["commands"]["launch"]["options"]
    tree["keys"] = {key: [told, values] for key, told, values in _keys(JobConfig, ())}
    return tree


def _command(command: Any) -> Tree:
    options, arguments = {}, []
    for parameter in command.params:
        choices = [
            choice
            for choice in _values(parameter.type_descriptor.annotation)
            if not getattr(parameter, "is_flag", False)
        ]
        metavar = str(parameter.metavar or parameter.name).upper()
        if parameter.param_type_name == "argument":
            arguments.append([metavar, choices])
            continue
        value = "" if getattr(parameter, "is_flag", False) else metavar
        for name in (*parameter.opts, *parameter.secondary_opts):
            options[name] = [parameter.help or "", value, choices]
    options["--help"] = ["Show this message and exit.", "", []]
    commands = {name: _command(inner) for name, inner in getattr(command, "commands", {}).items()}
    help_line = (command.help or "").strip().partition("\n\n")[0].replace("\n", " ")
    return {"help": help_line, "options": options, "arguments": arguments, "commands": commands}


def _keys(model: Any, above: tuple[str, ...]) -> Iterator[tuple[str, str, list[str]]]:
    """Every dotted key below a model with its type, and the values that it may have, where there are few."""
    for name, field in model.model_fields.items():
        path = (*above, name)
        yield ".".join(path), _told(field.annotation), _values(field.annotation)
        for inner in dict.fromkeys(_models(field.annotation)):
            yield from _keys(inner, path)


def _models(annotation: Any) -> Iterator[Any]:
    """Models of which a value may be one; not those of items of lists, whose keys have an index."""
    if hasattr(annotation, "model_fields"):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            yield from _models(part)


def _told(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _told(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(
            dict.fromkeys("null" if part is type(None) else _told(part) for part in get_args(annotation))
        )
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if hasattr(annotation, "model_fields"):
        return "keys"
    return getattr(annotation, "__name__", str(annotation))


def _values(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [str(one.value) for one in annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        inner = [_values(part) for part in get_args(annotation)]
        return [value for values in inner for value in values]
    return []


def _file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "evermesh/completion.json"


def _key() -> str:
    """Another one whenever a file that the tree is made from has changed, or Python is another."""
    newest = max(path.stat().st_mtime_ns for pattern in _SOURCES for path in _ROOT.glob(pattern))
    return f"{_ROOT} {newest} {sys.version_info[:2]}"

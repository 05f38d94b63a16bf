"""The reference of the command line, from the commands themselves."""

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from rich.text import Text

from docs.site.cells import cell
from evermesh.launcher.commands.app import app

_HEAD = """# Command reference

What `evermesh --help` and `evermesh COMMAND --help` say, made from the commands. What they end with is in
[exit codes](../operate/exit_codes.md); the flags of `evermesh launch SCRIPT` are [torchrun's](script_flags.md).
"""


@dataclass(frozen=True, slots=True)
class Command:
    """One command, or a group of them."""

    name: str
    """With those before it: ``checkpoint ls``."""
    command: Any

    @property
    def is_group(self) -> bool:
        return hasattr(self.command, "commands")

    @property
    def anchor(self) -> str:
        return self.name.replace(" ", "-")


def commands() -> Iterator[Command]:
    """Every command that help shows, each group before what is in it."""

    def walk(group: Any, before: str) -> Iterator[Command]:
        for name, command in group.commands.items():
            if not command.hidden:
                yield Command(f"{before}{name}", command)
                if hasattr(command, "commands"):
                    yield from walk(command, f"{before}{name} ")

    yield from walk(typer.main.get_command(app), "")


def commands_page() -> str:
    """The page, in Markdown."""
    found = list(commands())
    rows = [f"| [`{each.name}`](#{each.anchor}) | {_sentence(each)} |" for each in found if not each.is_group]
    index = "\n".join(["| `evermesh` ... | does |", "|---|---|", *rows])
    return "\n".join([_HEAD, index, "", *map(_rendered, found)])


def option_names(parameter: Any) -> list[str]:
    """How an option is spelled; an argument as its place is called."""
    if parameter.param_type_name == "argument":
        return [(parameter.metavar or parameter.name.upper()).strip("[]")]
    return [*parameter.opts, *parameter.secondary_opts]


def _rendered(each: Command) -> str:
    level = "##" if " " not in each.name else "###"
    parts = [f"{level} {each.name} {{ #{each.anchor} }}", _markdown(each.command.help or "")]
    if not each.is_group:
        parts += [f"```\n{_usage(each)}\n```", _table(each)]
        parts += _epilog(each.command.epilog or "")
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(each: Command) -> str:
    words = ["evermesh", each.name]
    options = [parameter for parameter in each.command.params if parameter.param_type_name == "option"]
    words += [f"{parameter.opts[0]} {_metavar(each, parameter)}" for parameter in options if parameter.required]
    if any(not parameter.required for parameter in options):
        words.append("[OPTIONS]")
    for parameter in each.command.params:
        if parameter.param_type_name == "argument":
            (name,) = option_names(parameter)
            many = "..." if parameter.nargs != 1 and not name.endswith("...") else ""
            words.append(f"{name}{many}" if parameter.required else f"[{name}{many}]")
    return " ".join(words)


def _table(each: Command) -> str:
    rows = [_row(each, parameter) for parameter in each.command.params if not parameter.hidden]
    return "\n".join(["| name | meaning | default |", "|---|---|---|", *rows]) if rows else ""


def _row(each: Command, parameter: Any) -> str:
    metavar = _metavar(each, parameter)
    names = ", ".join(f"`{name}`" for name in option_names(parameter)) + (f" `{metavar}`" if metavar else "")
    return f"| {cell(names)} | {cell(_markdown(parameter.help or ''))} | {cell(_default(parameter))} |"


def _metavar(each: Command, parameter: Any) -> str:
    """What the value of an option is called; empty for a switch, and for an argument."""
    if parameter.param_type_name == "argument" or parameter.is_flag:
        return ""
    if parameter.metavar:
        return str(parameter.metavar)
    return _value_word(inspect.signature(each.command.callback).parameters[parameter.name].annotation)


def _value_word(annotation: Any) -> str:
    """A word for the values of an annotation, or all of them."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "|".join(str(member.value) for member in annotation)
    known = {int: "N", float: "NUMBER", Path: "PATH"}
    inner = [argument for argument in get_args(annotation) if argument is not type(None)]
    return _value_word(inner[0]) if inner else known.get(annotation, "TEXT")


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value is False or value in ([], (), ""):
        return ""
    if isinstance(value, Enum | Path):
        value = value.value if isinstance(value, Enum) else str(value)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _epilog(text: str) -> list[str]:
    """Examples as code, what else is said as text."""
    lines = [Text.from_markup(line).plain for line in text.splitlines() if line.strip()]
    examples = "\n".join(line.strip() for line in lines if line.startswith("  "))
    rest = [_escaped(line) for line in lines if not line.startswith("  ") and line not in ("Examples", "Example")]
    return ([f"```\n{examples}\n```"] if examples else []) + rest


def _sentence(each: Command) -> str:
    return cell(_markdown((each.command.help or "").split("\n\n")[0]))


def _markdown(text: str) -> str:
    """Rich's markup and line breaks as Markdown."""
    plain = re.sub(r"\[(bold|dim|italic)\]([^\[]*)\[/\1?\]", r"**\2**", text)
    return "\n\n".join(_escaped(" ".join(part.split())) for part in plain.split("\n\n"))


def _escaped(text: str) -> str:
    """Angle brackets are no HTML here."""
    return text.replace("<", "&lt;")

"""YAML as job files use it: every key with its line, and only words, numbers and null as values.

The values are those of YAML 1.2: ``yes`` and ``2024-01-01`` are words, ``010`` is ten, ``1e3`` is a number. True and
false are words too, which become truth values only where a key wants one: ``workers: true`` is not one worker.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evermesh.launcher.errors import JobFileInvalid, Problem

Key = tuple[str | int, ...]

_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_NUMBER_STARTS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  PyYAML's own way; those of YAML 1.1 are not wanted


class _Dumper(yaml.SafeDumper):
    """Quotes whatever any version of YAML would take for something else than a word."""


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


_Loader.add_implicit_resolver(_tag("int"), re.compile(r"^[-+]?[0-9]+$"), _NUMBER_STARTS[:2] + _NUMBER_STARTS[3:])
_Loader.add_implicit_resolver(_tag("float"), re.compile(f"^({_NUMBER})$"), _NUMBER_STARTS)
_Loader.add_implicit_resolver(_tag("null"), re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_tag("merge"), re.compile(r"^<<$"), ["<"])
_Loader.add_constructor(_tag("int"), lambda loader, node: int(node.value))  # no octal numbers
_Dumper.add_implicit_resolver(_tag("float"), re.compile(f"^({_NUMBER})$"), _NUMBER_STARTS)


def read(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    """The values of a file, and the line of every key and of every item of a list.

    Raises:
        JobFileInvalid: the file cannot be read, is no YAML mapping, or has a key twice.
    """
    try:
        loader = _Loader(path.read_text())
        root = loader.get_single_node()
        lines = _lines(path, root)
        return loader.construct_document(root), lines
    except JobFileInvalid:
        raise
    except FileNotFoundError:
        raise _whole_file(path, f"no such file (looked from {Path.cwd()}). Give the path of a job file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _whole_file(path, f"cannot be read as text ({error}). Give the path of a job file.") from error
    except RecursionError:
        raise _whole_file(path, "is nested too deeply, or an anchor contains itself.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        fact = ", ".join(part for part in (error.context, error.problem) if part)
        text = f"not YAML: {fact}. Check indentation (spaces, no tabs), quotes and colons near this line."
        raise JobFileInvalid([Problem(f"{path}:{line}", "", text)]) from error
    except (yaml.YAMLError, ValueError) as error:
        raise _whole_file(path, f"not YAML: {' '.join(str(error).split())}.") from error


def value(text: str) -> Any:
    """One value as it is written in a job file.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        return yaml.load(text, _Loader)  # a safe loader, with fewer types still
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{text!r} is not a YAML value") from error


def write(values: Mapping[str, Any], path: Path) -> None:
    """Write ``values`` so that ``read`` finds the same."""
    path.write_text(text_of(values))


def text_of(values: Mapping[str, Any]) -> str:
    """YAML that ``read`` understands."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def dotted(key: Sequence[str | int]) -> str:
    """The key as it is written in an override."""
    return ".".join(str(part) for part in key)


def _lines(path: Path, root: yaml.Node | None) -> dict[Key, int]:
    if not isinstance(root, yaml.MappingNode):
        found = "is empty" if root is None or root.value == "" else "holds no mapping of keys"
        raise _whole_file(path, f"{found}. A job needs at least train.data.sources; see deploy/jobs/quickstart.yaml.")
    lines: dict[Key, int] = {}
    problems = []
    for key, node in _nodes(root, ()):
        line = node.start_mark.line + 1
        if key in lines:
            problems.append(Problem(f"{path}:{line}", dotted(key), f"{dotted(key)} is given twice; remove one."))
        lines[key] = line
    if problems:
        raise JobFileInvalid(problems)
    return lines


def _nodes(node: yaml.Node, key: Key) -> Iterator[tuple[Key, yaml.Node]]:
    """Every key of the document with the node that marks its line: the key itself, or the item of a list."""
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a list or a mapping", problem_mark=name.start_mark)
            if name.tag != _tag("merge"):
                name.tag = _tag("str")  # 3 and null, as keys, are words
            yield (*key, name.value), name
            yield from _nodes(child, (*key, name.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*key, index), item
            yield from _nodes(item, (*key, index))


def _whole_file(path: Path, text: str) -> JobFileInvalid:
    return JobFileInvalid([Problem(str(path), "", text)])

"""Reads a job file and overrides of it; every problem is reported with its key, its line and the way out."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import JobFileInvalid, Problem
from evermesh.parallelism.errors import LayoutDoesNotFit

Key = tuple[str | int, ...]


def load_job(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The job that the YAML file ``path`` describes, after ``overrides`` such as ``train.steps=20``.

    An override is a dotted key (indices for lists) and a YAML value; later ones win.

    Raises:
        JobFileInvalid: names every problem, each with the line of the file or the override that it comes from.
    """
    values, origins = _read(path)
    for override in overrides:
        _apply(override, values, origins)
    try:
        return JobConfig.model_validate(values)
    except ValidationError as error:
        raise JobFileInvalid(_problems(error, values, origins, str(path))) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """The values of a file and, for every key, ``FILE:LINE``."""
    root = _compose(path)
    if not isinstance(root, yaml.MappingNode):
        found = "is empty" if root is None else "holds no mapping of keys"
        raise _whole_file(path, f"{found}. A job needs at least train.data.sources; see deploy/jobs/quickstart.yaml.")
    repeated = [
        Problem(f"{path}:{line}", key, f"{key} is given twice; remove one.") for key, line in _repeated(root, ())
    ]
    if repeated:
        raise JobFileInvalid(repeated)
    values = yaml.safe_load(path.read_text())
    return values, {key: f"{path}:{node.start_mark.line + 1}" for key, node in _nodes(root, ())}


def _compose(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise _whole_file(path, f"no such file (looked from {Path.cwd()}). Give the path of a job file.") from None
    except (IsADirectoryError, UnicodeDecodeError, PermissionError) as error:
        raise _whole_file(path, f"cannot be read as text ({error}). Give the path of a job file.") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        text = f"not YAML: {error.problem or error.context}. Check indentation, quotes and colons near this line."
        raise JobFileInvalid([Problem(f"{path}:{line}", "", text)]) from error
    except yaml.YAMLError as error:
        raise _whole_file(path, f"not YAML: {error}") from error


def _whole_file(path: Path, text: str) -> JobFileInvalid:
    return JobFileInvalid([Problem(str(path), "", text)])


def _nodes(node: yaml.Node, key: Key) -> Iterator[tuple[Key, yaml.Node]]:
    """Every key of the document with the node that marks its line: the key itself, or the item of a list."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield (*key, name.value), name
            yield from _nodes(value, (*key, name.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*key, index), item
            yield from _nodes(item, (*key, index))


def _repeated(root: yaml.Node, key: Key) -> Iterator[tuple[str, int]]:
    seen = set()
    for found, node in _nodes(root, key):
        if found in seen:
            yield dotted(found), node.start_mark.line + 1
        seen.add(found)


def dotted(key: Sequence[str | int]) -> str:
    """The key as it is written in an override."""
    return ".".join(str(part) for part in key)


def _apply(override: str, values: dict[str, Any], origins: dict[Key, str]) -> None:
    name, equals, text = override.partition("=")
    origin = f"--set {override}"
    if not equals or not all(name.split(".")):
        raise _refused(origin, name, "is not KEY=VALUE; write for example --set train.steps=20.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _refused(origin, name, f"{text!r} is not a YAML value. Quote it.") from error
    parts: list[str | int] = [int(part) if part.isdecimal() else part for part in name.split(".")]
    _put(values, parts, value, origin)
    key = tuple(parts)
    for below in [old for old in origins if old[: len(key)] == key]:
        del origins[below]
    origins[key] = origin


def _put(values: Any, parts: list[str | int], value: Any, origin: str) -> None:
    """Set a nested value in place; missing mappings on the way are made, items of lists have to exist."""
    for depth, part in enumerate(parts):
        here = dotted(parts[:depth]) or "the job"
        if isinstance(values, dict):
            step: Any = str(part)
            following = values[step] = values.get(step) if values.get(step) is not None else {}
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            step, following = part, values[part]
        elif isinstance(values, list):
            allowed = f"0 to {len(values) - 1}" if values else "none: it is empty"
            raise _refused(origin, dotted(parts), f"{here} is a list; its indices are {allowed}.")
        else:
            raise _refused(origin, dotted(parts), f"{here} is {_shown(values)}, which has no keys below it.")
        if depth == len(parts) - 1:
            values[step] = value
        values = following


def _refused(origin: str, key: str, text: str) -> JobFileInvalid:
    return JobFileInvalid([Problem(origin, key, text)])


def _problems(error: ValidationError, values: Any, origins: dict[Key, str], path: str) -> list[Problem]:
    """All problems in the order of the file, overrides last."""
    # an item that is refused also makes its list "too short": only the item is worth a line
    found = [details for details in error.errors() if details["type"] != "too_short" or not details["input"]]
    order = {origin: index for index, origin in enumerate(origins.values())}
    problems = [_problem(dict(details), values, origins, path) for details in found]
    return sorted(problems, key=lambda problem: order.get(problem.where, -1))


def _problem(error: dict[str, Any], values: Any, origins: dict[Key, str], path: str) -> Problem:
    """What pydantic found, in the words of the job file."""
    kind, cause = error["type"], error.get("ctx", {}).get("error")
    key = _key_in_file(error["loc"], values)
    if isinstance(cause, LayoutDoesNotFit):
        key = ("train", "layout", "hdp") if _given(values, ("train", "layout", "hdp")) else ("workers",)
        text = str(cause)
    elif kind == "extra_forbidden":
        text = _unknown(key)
    elif kind == "missing":
        text = f"{dotted(key)} is missing; add it. {_known(key[:-1])}"
        key = key[:-1]
    elif kind == "union_tag_not_found":
        text = f"{dotted(key)}.kind is missing; it is one of {', '.join(_schema_at(key)['discriminator']['mapping'])}."
    elif kind == "union_tag_invalid":
        text = f"{dotted(key)}.kind is {error['ctx']['tag']!r}; it is one of {error['ctx']['expected_tags']}."
        key = (*key, "kind")
    elif cause is not None:
        text = f"{dotted(key)}: {cause}."
    else:
        text = f"{dotted(key)} is {_shown(error['input'])}; {_expected(error['msg'])}."
    return Problem(_origin(key, origins, path), dotted(key), text)


def _key_in_file(location: tuple[str | int, ...], values: Any) -> Key:
    """Where pydantic's location is in the file: it also names the chosen ``kind`` of a union, which the file does not."""
    key: list[str | int] = []
    for part in location:
        if isinstance(values, dict) and part not in values and values.get("kind") == part:
            continue
        key.append(part)
        values = _child(values, part)
    return tuple(key)


def _child(values: Any, part: str | int) -> Any:
    if isinstance(values, dict):
        return values.get(part)
    return values[part] if isinstance(values, list) and isinstance(part, int) and part < len(values) else None


def _given(values: Any, key: Key) -> bool:
    for part in key:
        values = _child(values, part)
    return values is not None


def _origin(key: Key, origins: dict[Key, str], path: str) -> str:
    """The line of the key, or of the nearest key around it."""
    for depth in range(len(key), 0, -1):
        if key[:depth] in origins:
            return origins[key[:depth]]
    return path


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    return "empty (null)" if value is None else repr(value)


def _expected(message: str) -> str:
    """Pydantic's sentence as the second half of ours."""
    return re.sub(r"^(Input|String|List|Tuple|Value) should", "it should", message)


def _unknown(key: Key) -> str:
    name = str(key[-1])
    siblings = list(_properties(key[:-1]))
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"{dotted(key)} is not a key. Did you mean {dotted((*key[:-1], close[0]))}?"
    elsewhere = [other for other in _all_keys(JobConfig.model_json_schema()) if other.split(".")[-1] == name]
    if elsewhere:
        return f"{dotted(key)} is not a key. Did you mean {' or '.join(elsewhere[:3])}?"
    return f"{dotted(key)} is not a key. {_known(key[:-1])}"


def _known(key: Key) -> str:
    return f"Keys of {dotted(key) or 'a job'}: {', '.join(_properties(key))}."


def _properties(key: Key) -> dict[str, Any]:
    schema = _schema_at(key)
    choices = schema.get("discriminator", {}).get("mapping", {}).values()
    found = dict(schema.get("properties", {}))
    for choice in choices:
        found.update(_resolved({"$ref": choice})["properties"])
    return found


def _schema_at(key: Key) -> dict[str, Any]:
    """The JSON schema of what stands at ``key``; a union of kinds is returned as a whole."""
    schema = JobConfig.model_json_schema()
    for part in key:
        schema = _resolved(
            schema.get("items", {}) if isinstance(part, int) else schema.get("properties", {}).get(part, {})
        )
    return schema


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = JobConfig.model_json_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    return _resolved(options[0]) if len(options) == 1 else schema


def _all_keys(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, child in schema.get("properties", {}).items():
        yield f"{prefix}{name}"
        yield from _all_keys(_resolved(child), f"{prefix}{name}.")

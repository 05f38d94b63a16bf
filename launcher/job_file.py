"""Reads a job file and overrides of it; every problem is reported with its key, its line and the way out."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evermesh.launcher import job_model, job_yaml
from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import JobFileInvalid, Problem
from evermesh.launcher.job_yaml import Key, dotted
from evermesh.parallelism.errors import LayoutDoesNotFit

_SENTENCES = (
    (r"^.*valid dictionary.*$", "it should be a mapping of keys"),
    (r"^.*valid (tuple|list)$", "it should be a list"),
    (r"^.*valid path.*$", "it should be a path"),
    (r" after validation, not \d+$", ""),
    (r"^(Input|String|List|Tuple|Value) should", "it should"),
)
"""Pydantic's sentences in the words of a job file."""


def load_job(path: Path | str, overrides: Sequence[str] = ()) -> JobConfig:
    """The job that the YAML file ``path`` describes, after ``overrides`` such as ``train.steps=20``.

    An override is a dotted key (indices for lists) and a YAML value; later ones win.

    Raises:
        JobFileInvalid: names every problem, each with the line of the file or the override that it comes from.
    """
    values, lines = job_yaml.read(Path(path))
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        _apply(override, values, origins)
    job_model.fill(values, lambda key: _origin(key, origins, str(path)))
    try:
        return JobConfig.model_validate(values)
    except ValidationError as error:
        raise JobFileInvalid(_problems(error, values, origins, str(path))) from error


def write_job(config: JobConfig, path: Path) -> None:
    """Write every value of ``config`` to ``path`` as YAML; ``load_job`` reads the same configuration back."""
    job_yaml.write(config.model_dump(mode="json"), path)


def _apply(override: str, values: dict[str, Any], origins: dict[Key, str]) -> None:
    name, equals, text = override.partition("=")
    name, origin = name.strip(), f"--set {override}"
    if not equals or not all(name.split(".")):
        raise _refused(origin, name, "is not KEY=VALUE; write for example --set train.steps=20.")
    try:
        value = job_yaml.value(text)
    except ValueError as error:
        raise _refused(origin, name, f"{error}. Quote it.") from error
    key = _put(values, name.split("."), value, origin)
    for below in [old for old in origins if old[: len(key)] == key]:
        del origins[below]
    origins[key] = origin


def _put(values: Any, parts: list[str], value: Any, origin: str) -> Key:
    """Set a nested value in place; missing mappings on the way are made, items of lists have to exist."""
    key: list[str | int] = []
    for part in parts:
        here = dotted(key) or "the job"
        if isinstance(values, dict):
            step: Any = part
            following = values[step] = values.get(step) if values.get(step) is not None else {}
        elif isinstance(values, list) and part.isdecimal() and int(part) < len(values):
            step, following = int(part), values[int(part)]
        elif isinstance(values, list):
            allowed = f"0 to {len(values) - 1}" if values else "none: it is empty"
            raise _refused(origin, dotted(parts), f"{here} is a list; its indices are {allowed}.")
        else:
            raise _refused(origin, dotted(parts), f"{here} is {_shown(values)}, which has no keys below it.")
        key.append(step)
        if len(key) == len(parts):
            values[step] = value
        values = following
    return tuple(key)


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
        axis = cause.axis or "hdp"
        section = ("workers",) if axis == "hdp" else ("train", "layout")
        key = ("train", "layout", axis) if _at(values, ("train", "layout", axis)) is not None else section
        text = str(cause)
    elif kind == "extra_forbidden":
        text = _unknown(key, values)
    elif kind == "missing":
        text = f"{dotted(key)} is missing; add it. {_known(key[:-1], values)}".rstrip()
        key = key[:-1]
    elif kind == "union_tag_not_found":
        text = f"{dotted(key)}.kind is missing; it is one of {', '.join(_schema_at(key)['discriminator']['mapping'])}."
    elif kind == "union_tag_invalid":
        text = f"{dotted(key)}.kind is {_shown(error['input']['kind'])}; it is one of {error['ctx']['expected_tags']}."
        key = (*key, "kind")
    elif cause is not None:
        text = f"{dotted(key)}: {cause}."
    else:
        text = f"{dotted(key)} is {_shown(error['input'])}; {_expected(error['msg'])}."
    return Problem(_origin(key, origins, path), dotted(key), text)


def _key_in_file(location: tuple[str | int, ...], values: Any) -> Key:
    """Where pydantic's location is in the file: it also names the chosen branch of a union, which the file does not."""
    key: list[str | int] = []
    for part in location:
        if isinstance(part, str) and not isinstance(values, dict) and key:
            continue  # a type that a value might have had
        if isinstance(values, dict) and part not in values and part in _kinds(tuple(key)):
            continue
        key.append(part)
        values = _child(values, part)
    return tuple(key)


def _child(values: Any, part: str | int) -> Any:
    if isinstance(values, dict):
        return values.get(part)
    return values[part] if isinstance(values, list) and isinstance(part, int) and part < len(values) else None


def _at(values: Any, key: Key) -> Any:
    for part in key:
        values = _child(values, part)
    return values


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
    for pattern, words in _SENTENCES:
        message = re.sub(pattern, words, message)
    return message


def _unknown(key: Key, values: Any) -> str:
    section, name = key[:-1], str(key[-1])
    close = difflib.get_close_matches(name, _names(section, values), n=1)
    if close:
        return f"{dotted(key)} is not a key. Did you mean {dotted((*section, close[0]))}?"
    owners = [kind for kind, names in _kinds(section).items() if name in names]
    if owners:
        kind = _kind(section, values)
        return (
            f"{dotted(key)} is a key of kind {' and '.join(owners)}, but the kind is {kind}. Remove it, or replace the "
            f"section: --set '{dotted(section)}={{kind: {kind}}}'."
        )
    keys = dict.fromkeys(_all_keys(JobConfig.model_json_schema()))  # kinds of a section share keys
    elsewhere = [other for other in keys if other.split(".")[-1] == name]
    if elsewhere:
        return f"{dotted(key)} is not a key. Did you mean {' or '.join(elsewhere[:3])}?"
    return f"{dotted(key)} is not a key. {_known(section, values)}"


def _known(section: Key, values: Any) -> str:
    names = _names(section, values)
    return f"Keys of {dotted(section) or 'a job'}: {', '.join(names)}." if names else ""


def _names(section: Key, values: Any) -> list[str]:
    """The keys of a section; where it has kinds, of the kind that was chosen."""
    return _kinds(section).get(_kind(section, values), list(_schema_at(section).get("properties", {})))


def _kind(section: Key, values: Any) -> Any:
    """Which kind of a section was chosen, by default that of its default."""
    default = _schema_at(section).get("default")
    return _at(values, (*section, "kind")) or (default.get("kind") if isinstance(default, dict) else None)


def _kinds(section: Key) -> dict[str, list[str]]:
    """The keys of every kind of a section that has kinds."""
    choices = _schema_at(section).get("discriminator", {}).get("mapping", {})
    return {kind: list(_resolved({"$ref": choice})["properties"]) for kind, choice in choices.items()}


def _schema_at(key: Key) -> dict[str, Any]:
    """The JSON schema of what stands at ``key``; a union of kinds is returned as a whole."""
    schema = JobConfig.model_json_schema()
    for part in key:
        options = [schema, *map(_resolved, schema.get("oneOf", ()))]
        found = [option.get("properties", {}).get(part) for option in options]
        below = schema.get("items") if isinstance(part, int) else next(filter(None, found), None)
        schema = _resolved(below or {})
    return schema


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = JobConfig.model_json_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    return _resolved(options[0]) if len(options) == 1 else schema


def _all_keys(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for option in [schema, *map(_resolved, schema.get("oneOf", ()))]:
        for name, child in option.get("properties", {}).items():
            yield f"{prefix}{name}"
            yield from _all_keys(_resolved(child), f"{prefix}{name}.")

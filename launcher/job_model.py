"""The model of a job that starts from a Hugging Face directory is the one of that directory."""

from collections.abc import Callable, Iterator
from typing import Any

from evermesh.checkpoint.stores.places import place_of
from evermesh.launcher.errors import JobFileInvalid, Problem
from evermesh.launcher.job_yaml import Key
from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.families import CHOICES, read_model

_INIT_FROM: Key = ("train", "init_from")


def fill(values: Any, origin: Callable[[Key], str]) -> None:
    """Complete ``train.model`` in place with what the directory ``train.init_from`` says; leave other jobs alone.

    A job that gives every field of the model itself, as that of a run does, does not need the directory to be there; a
    new run compares the two when it loads the weights.

    Raises:
        JobFileInvalid: the directory holds no model that this version knows, or another one than the job gives.
    """
    train = values.get("train") if isinstance(values, dict) else None
    if not isinstance(train, dict) or not isinstance(train.get("init_from"), str):
        return  # absent, or refused as what it is
    directory, given = place_of(train["init_from"]), train.get("model")
    if not isinstance(given, dict | None):
        return
    given = given or {}
    if given.keys() >= ModelConfig.model_fields.keys():
        return
    try:
        there = read_model(directory).model_dump(mode="json")
    except UnsupportedModel as error:
        raise JobFileInvalid([Problem(origin(_INIT_FROM), "train.init_from", f"train.init_from: {error}")]) from error
    problems = [
        Problem(
            origin(("train", "model", *name.split("."))),
            f"train.model.{name}",
            f"train.model.{name} is {value!r}, but {directory} has {of_directory!r}. Leave it out.",
        )
        for name, value, of_directory in _both(given, there)
        if name not in CHOICES and value != of_directory
    ]
    if problems:
        raise JobFileInvalid(problems)
    train["model"] = _merged(there, given)


def _both(given: dict[str, Any], there: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What the job and the directory say of a field, where both do; fields of experts one by one."""
    for name, value in given.items():
        if name == "moe" and isinstance(value, dict) and isinstance(there[name], dict):
            yield from ((f"{name}.{inner}", v, of_directory) for inner, v, of_directory in _both(value, there[name]))
        elif name in there:
            yield name, value, there[name]


def _merged(there: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    merged = there | given
    if isinstance(given.get("moe"), dict):
        merged["moe"] = there["moe"] | given["moe"]
    return merged

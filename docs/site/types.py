"""What a field of the job file takes, in words, from its type."""

import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from evermesh.checkpoint.stores.places import ObjectPath

_WORDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "`true` or `false`",
    str: "text",
    Path: "path",
    ObjectPath: "URL of an object store",
    type(None): "`null`",
}


def told_type(field: FieldInfo) -> str:
    """The values that a field takes, such as ``whole number > 0, or `null```."""
    text = _told(field.annotation, field.metadata)
    switch = any(
        getattr(getattr(item, "func", None), "__qualname__", "").startswith("or_default") for item in field.metadata
    )
    return f"`true`, `false`, or {text.removesuffix(' or `null`')}" if switch else text


def models_in(annotation: Any, suffix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The models that an annotation names, with what their path has behind the one of the field: ``[]`` in a list."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from models_in(arguments[0], suffix)
    elif isinstance(annotation, type) and origin is None and issubclass(annotation, BaseModel):
        yield suffix, annotation
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from models_in(argument, suffix)
    elif origin in (tuple, list):
        yield from models_in(arguments[0], suffix + "[]")
    elif origin is dict:
        yield from models_in(arguments[1], suffix + ".*")


def kind_of(model: type[BaseModel]) -> str | None:
    """The word in ``kind`` that chooses ``model`` among others; None: it is no choice."""
    field = model.model_fields.get("kind")
    words = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return str(words[0]) if len(words) == 1 else None


def _told(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _told(arguments[0], (*arguments[1:], *metadata))
    if origin in (Union, types.UnionType):
        return _told_union(arguments, metadata)
    if origin is Literal:
        return _alternatives([f"`{value}`" for value in arguments])
    if origin in (tuple, list):
        return _told_list(arguments)
    if origin is dict:
        return f"map from {_told(arguments[0])} to {_told(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = kind_of(annotation)
        return f"section of kind `{kind}`" if kind else "section"
    return _WORDS[annotation] + "".join(_limits(metadata))


def _told_union(arguments: tuple[Any, ...], metadata: Iterable[Any]) -> str:
    kinds = [kind for model in arguments if (kind := _kind_in(model)) is not None]
    others = [_told(argument, metadata) for argument in arguments if _kind_in(argument) is None]
    sections = [f"section of kind {_alternatives([f'`{kind}`' for kind in kinds])}"] if kinds else []
    return _alternatives([*sections, *others])


def _kind_in(annotation: Any) -> str | None:
    return kind_of(annotation) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _told_list(arguments: tuple[Any, ...]) -> str:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"list of: {_told(arguments[0])}"
    if len(arguments) == 1:
        return f"list of: {_told(arguments[0])}"
    return "list of " + ", ".join(_told(argument) for argument in arguments)


def _limits(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        match item:
            case annotated_types.Gt(gt=limit):
                yield f" > {limit}"
            case annotated_types.Ge(ge=limit):
                yield f" ≥ {limit}"
            case annotated_types.Lt(lt=limit):
                yield f" < {limit}"
            case annotated_types.Le(le=limit):
                yield f" ≤ {limit}"
            case FieldInfo():
                yield from _limits(item.metadata)
            case _ if (pattern := getattr(item, "pattern", None)) is not None:
                yield f" of the form `{pattern}`"


def _alternatives(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"

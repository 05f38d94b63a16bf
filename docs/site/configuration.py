"""The reference of the job file, from the models that read it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from docs.site.attributes import attribute_docs, one_line
from docs.site.types import kind_of, models_in, told_type
from evermesh.launcher.config import JobConfig

_HEAD = """# Configuration reference

Every key of a job file, by its path: `train.layout.tp` is

```yaml
train:
  layout: {tp: 2}
```

in the file, and `--set train.layout.tp=2` on the command line. Unknown keys and impossible values are refused with their
line, the allowed ones, and a way out. Names end in their unit: `_s` seconds, `_h` hours; sizes of text are in tokens. What is
left out has the default; the resolved configuration of a run is in `runs/NAME/job.yaml`. This page is made from the models
that read the file.
"""


_SHORT = {None: "required", "{}": "default: the section with its defaults"}


@dataclass(frozen=True, slots=True)
class Field:
    """One key."""

    path: str
    type: str
    default: str | None
    """As the file would say it; None: it has to be given."""
    text: str
    """Empty: the model says nothing about it."""


@dataclass(frozen=True, slots=True)
class Section:
    """One model at one place of the file."""

    path: str
    """Empty: the file itself."""
    kind: str | None
    """The ``kind`` that chooses it there."""
    text: str
    fields: tuple[Field, ...]

    @property
    def anchor(self) -> str:
        return "-".join(filter(None, (self.path or "job", self.kind, "section")))


def sections(model: type[BaseModel] = JobConfig, path: str = "") -> Iterator[Section]:
    """The sections below ``path``, each before what is inside it; a model that is reached twice at a path comes once."""
    seen: set[tuple[str, type[BaseModel]]] = set()

    def walk(model: type[BaseModel], path: str) -> Iterator[Section]:
        if (path, model) in seen:
            return
        seen.add((path, model))
        yield _section(model, path)
        for name, field in model.model_fields.items():
            for suffix, inner in models_in(field.annotation):
                yield from walk(inner, _joined(path, name) + suffix)

    yield from walk(model, path)


def configuration_page() -> str:
    """The page, in Markdown."""
    return "\n".join([_HEAD, *map(_rendered, sections())])


def _section(model: type[BaseModel], path: str) -> Section:
    docs, about = attribute_docs(model), one_line(model.__doc__ or "")
    fields = tuple(_field(name, field, path, docs, about) for name, field in model.model_fields.items())
    return Section(path, kind_of(model), about, fields)


def _field(name: str, field: FieldInfo, path: str, docs: dict[str, str], about: str) -> Field:
    text = docs.get(name, "")
    if not text and name == "kind":
        text = about
    if not text and (models := list(models_in(field.annotation))):
        text = " ".join(one_line(model.__doc__ or "") for _, model in models)
    return Field(_joined(path, name), told_type(field), _default(field), text)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        kind = kind_of(type(value))
        return json.dumps(({"kind": kind} if kind else {}) | changed)
    return json.dumps(to_jsonable_python(value))


def _rendered(section: Section) -> str:
    title = f"`{section.path}`" if section.path else "The file"
    which = f", kind `{section.kind}`" if section.kind else ""
    head = f"## {title}{which} {{ #{section.anchor} }}\n\n{_markdown(section.text)}\n"
    return "\n".join([head, *(_rendered_field(field, section) for field in section.fields)])


def _rendered_field(field: Field, section: Section) -> str:
    anchor = f"{field.path}-{section.kind}" if section.kind else field.path
    default = _SHORT.get(field.default) or f"default `{field.default}`"
    return f"#### `{field.path}` {{ #{anchor} }}\n\n{field.type}; {default}\n{{ .takes }}\n\n{_markdown(field.text)}\n"


def _markdown(text: str) -> str:
    """A docstring as Markdown: None is what YAML calls null; stars and lone brackets are no markup."""
    return re.sub(r"\bNone\b", "null", text).replace("*", r"\*")

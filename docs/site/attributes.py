"""Docstrings under attributes, which Python itself throws away: read from the source."""

import ast
import inspect
import itertools
import textwrap
from types import ModuleType


def attribute_docs(of: type | ModuleType) -> dict[str, str]:
    """The docstring under every attribute of a class, those of its bases included, or of a module; by name, on one line."""
    if isinstance(of, ModuleType):
        return _documented(ast.parse(inspect.getsource(of)).body)
    found: dict[str, str] = {}
    for base in reversed(of.__mro__):
        if base.__module__.startswith("evermesh."):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            found |= _documented(definition.body)
    return found


def one_line(text: str) -> str:
    """A docstring without its line breaks; blank lines stay."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def _documented(body: list[ast.stmt]) -> dict[str, str]:
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        match following:
            case ast.Expr(value=ast.Constant(value=str(text))):
                found |= dict.fromkeys(_names(statement), one_line(text))
    return found


def _names(statement: ast.stmt) -> list[str]:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]

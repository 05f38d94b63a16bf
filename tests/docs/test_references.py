"""The references and the operating guide say all that the code knows, and nothing else."""

import ast
import functools
import re
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from docs.site.alerts import alerts_list
from docs.site.commands import Command, commands, commands_page
from docs.site.configuration import configuration_page, sections
from docs.site.findings import finding_kinds, findings_table
from docs.site.metrics import metric_name, metrics_page, of_a_job, of_a_node
from docs.site.pictures.states import transitions
from docs.site.script_flags import script_flags_page
from evermesh.deploy.monitoring.alerts import ALERTS
from evermesh.launcher.commands.app import app
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.status import JobState
from evermesh.launcher.policy import DO_NOT_REQUEUE, REQUEUE
from evermesh.launcher.scripts.flags import FLAGS, FOREIGN
from tests.docs.conftest import DOCS, ROOT

_ROOMS = ("parallelism", "checkpoint", "fault", "runtime", "launcher")


def _paths(schema: Mapping[str, Any], defs: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Every key below a JSON schema, by its path."""
    if "$ref" in schema:
        yield from _paths(defs[schema["$ref"].rpartition("/")[2]], defs, path)
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _paths(choice, defs, path)
    if isinstance(schema.get("items"), dict):
        yield from _paths(schema["items"], defs, f"{path}[]")
    for name, inner in schema.get("properties", {}).items():
        yield f"{path}.{name}".lstrip(".")
        yield from _paths(inner, defs, f"{path}.{name}".lstrip("."))


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every key of a job file, as its JSON schema has them."""
    schema = JobConfig.model_json_schema()
    return set(_paths(schema, schema["$defs"]))


def test_the_configuration_reference_has_every_key_and_no_other(keys: set[str]) -> None:
    told = [field for section in sections() for field in section.fields]
    assert {field.path for field in told} == keys
    assert len(keys) > 150
    page = configuration_page()
    for field in told:
        assert f"#### `{field.path}`" in page


def test_every_key_has_a_description() -> None:
    missing = [
        f"{section.anchor}: {field.path}" for section in sections() for field in section.fields if not field.text
    ]
    assert not missing, f"no docstring under {missing}"


def test_anchors_of_the_configuration_reference_differ() -> None:
    anchors = re.findall(r"\{ #([^ ]+) \}", configuration_page())
    assert len(set(anchors)) == len(anchors)


@pytest.mark.parametrize(
    ("path", "type_", "default"),
    [
        ("workers", "whole number > 0", "1"),
        ("grow_after_s", "number > 0 or `null`", "300.0"),
        ("preflight", "`quick`, `full` or `off`", '"quick"'),
        ("train.data", "section", None),
        ("train.snapshot.most_cost", "number > 0.0 < 1.0", "0.01"),
        ("train.data.sources", "list of: section of kind `corpus` or `stdlib`", None),
        ("train.layout.offload", "number ≥ 0.0 ≤ 1.0 or `auto`", "0.0"),
        ("train.optimizer", "section of kind `adamw` or `lamb`", '{"kind": "adamw"}'),
    ],
)
def test_types_and_defaults_are_told_as_a_reader_needs_them(path: str, type_: str, default: str | None) -> None:
    (field,) = {field for section in sections() for field in section.fields if field.path == path}
    assert (field.type, field.default) == (type_, default)


def test_keys_shown_in_pages_are_keys_of_the_job_file(keys: set[str]) -> None:
    named_by_users = {field.path for section in sections() for field in section.fields if field.type.startswith("map ")}
    starts = {key.split(".")[0] for key in keys} | {key.split(".")[1] for key in keys if key.startswith("train.")}
    seen = 0
    for page in DOCS.rglob("*.md"):
        if "decisions" in page.parts:
            continue
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            shown = yaml.safe_load(re.sub(r"^isolation: advise.*$", "", block, flags=re.MULTILINE))
            if not isinstance(shown, dict) or not starts & shown.keys() or isinstance(shown.get("nodes"), list):
                continue  # of another file: alerts, faults, Prometheus, a topology
            for path in _keys_in(shown):
                seen += 1
                if path.rpartition(".")[0] not in named_by_users:
                    assert any(key == path or key.endswith(f".{path}") for key in keys), f"{page}: {path}"
    assert seen > 40


def _keys_in(value: Any, path: str = "") -> Iterator[str]:
    if path.startswith("racks."):
        return
    if path:
        yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _keys_in(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict):
                for name, deeper in inner.items():
                    yield from _keys_in(deeper, f"{path}[].{name}")


_commands_page = functools.cache(commands_page)


def _section(page: str, each: Command) -> str:
    start = page.index(f"{{ #{each.anchor} }}")
    return re.split(r"\n#{2,3} ", page[start:])[0]


@pytest.mark.parametrize("each", [each for each in commands() if not each.is_group], ids=lambda each: each.anchor)
def test_the_command_reference_has_what_help_shows(each: Command) -> None:
    shown = CliRunner().invoke(app, [*each.name.split(), "--help"], env={"COLUMNS": "250", "TERM": "dumb"})
    assert shown.exit_code == 0
    options = set(
        re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown.output.partition("Options")[2].partition("Examples")[0])
    )
    told = _section(_commands_page(), each)
    assert options - {"--help"}
    for option in options - {"--help"}:
        assert f"`{option}`" in told, f"{each.name} {option}"
    for line in re.findall(
        r"^\s+(evermesh [^#\n│]+?)\s*(?:#.*)?$", shown.output.partition("Examples")[2], re.MULTILINE
    ):
        assert " ".join(line.split()) in " ".join(told.split()), f"example of {each.name}: {line}"


def test_the_reference_of_flags_has_all_that_are_read() -> None:
    page = script_flags_page()
    for name in (*(name for flag in FLAGS for name in flag.names), *FOREIGN, *(flag.variable for flag in FLAGS)):
        assert f"`{name}`" in page


_TELLERS = ("gauge", "gauges", "states", "counter", "counters")


def _metric_names() -> set[str]:
    """Names that the code tells Prometheus: literals that come first in a call, or in a row that such a call loops over."""
    found = set()
    for file in (*(ROOT / "launcher" / "metrics").glob("*.py"), ROOT / "launcher" / "agent" / "numbers.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _TELLERS:
                if isinstance(node.args[0], ast.Constant):
                    found.add(str(node.args[0].value))
            elif isinstance(node, ast.For) and ast.unparse(node.target).startswith("(name, text"):
                prefix = next(re.findall(r"f'(\w+)\{name\}'", ast.unparse(node)) or [""] for _ in "x")[0]
                found |= {prefix + ast.literal_eval(row)[0] for row in node.iter.elts}  # type: ignore[attr-defined]
    return {f"evermesh_{name}" for name in found}


def test_the_list_of_metrics_has_every_family_that_the_code_tells() -> None:
    families = {family.name for family in (*of_a_job(), *of_a_node())}
    assert families >= _metric_names()
    assert len(_metric_names()) > 55
    assert all(f"`{metric_name(family)}`" in metrics_page() for family in (*of_a_job(), *of_a_node()))


def test_alerts_ask_for_metrics_states_and_events_that_exist() -> None:
    names = {metric_name(family) for family in (*of_a_job(), *of_a_node())}
    known = {state for family in of_a_job() for sample in family.samples for state in [sample.labels.get("state")]}
    for alert in ALERTS:
        for name in re.findall(r"evermesh_\w+", alert.expr):
            assert name in names, alert
        for states in re.findall(r'state=~?"([^"]+)"', alert.expr):
            assert known.issuperset(states.split("|")), alert
        for kind in re.findall(r'kind="([^"]+)"', alert.expr):
            assert kind in _event_kinds(), alert
        assert f"`{alert.name}`" in alerts_list()
    assert not re.search("{{|}}", alerts_list()), "words of Prometheus that nobody fills in"


def test_every_kind_of_finding_has_a_section_and_a_row() -> None:
    headings = re.findall(r"^## (.+)$", (DOCS / "operate" / "findings.md").read_text(), re.MULTILINE)
    assert headings == finding_kinds()
    assert all(f"[`{kind}`]" in findings_table() for kind in finding_kinds())


@functools.cache
def _event_kinds() -> set[str]:
    """Kinds of events that some code writes: literals in the calls that do, and in what those calls choose from."""
    found = {"unreadable"}
    writes = re.compile(r"\.(tell|_?log|_?record)\(|\b(events|log)\.write\(|_noticed\.append\(")
    for room in _ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            if writes.search(text := file.read_text()):
                nodes = list(ast.walk(ast.parse(text)))
                found |= {kind for node in nodes for kind in _kinds_of(node)}
                if ".tell(kind," in text:
                    found |= {kind for node in nodes for kind in _chosen_kinds(node)}
    return found


def _kinds_of(node: ast.AST) -> Iterator[str]:
    constants = {"INJECTED": "injected", "KEEPER_LOST": "keeper lost"}
    match node:
        case ast.Call(func=ast.Attribute(attr="tell" | "log" | "_log" | "record" | "_record"), args=[first, _, *_]):
            yield from (
                str(one.value) for one in ast.walk(first) if isinstance(one, ast.Constant) and _is_kind(one.value)
            )
        case ast.Call(func=ast.Attribute(value=ast.Name(id="events" | "log"), attr="write"), args=[first, _, *_]):
            yield from (
                str(one.value) for one in ast.walk(first) if isinstance(one, ast.Constant) and _is_kind(one.value)
            )
            yield from (
                constants[one.id] for one in ast.walk(first) if isinstance(one, ast.Name) and one.id in constants
            )
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="_noticed")), args=[ast.Tuple(elts=[first, _])]):
            yield constants.get(ast.unparse(first)) or str(ast.literal_eval(first))


def _chosen_kinds(node: ast.AST) -> Iterator[str]:
    """Of ``kind = "a" if ... else "b"``."""
    match node:
        case ast.Assign(targets=[ast.Name(id="kind")], value=ast.IfExp(body=ast.Constant(a), orelse=ast.Constant(b))):
            yield from (str(a), str(b))


def _is_kind(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z][a-z -]+", value) is not None


def test_every_kind_of_event_has_a_row_and_no_other_has() -> None:
    told = set(re.findall(r"^\| `([^`]+)` \|", (DOCS / "operate" / "events.md").read_text(), re.MULTILINE))
    assert told == _event_kinds()


def test_the_table_of_faults_names_events_that_exist() -> None:
    rows = (DOCS / "operate" / "faults.md").read_text().splitlines()
    seen = [row.split(" | ")[-2] for row in rows if row.startswith("| ") and not row.startswith("| what")]
    named = {kind for cell in seen for kind in re.findall(r"`([^`]+)`", cell)}
    assert named - {"top", "requeue_on_term"} <= _event_kinds()
    assert len(named) > 15


def test_the_page_of_exit_codes_has_those_of_the_policy() -> None:
    page = (DOCS / "operate" / "exit_codes.md").read_text()
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert told == {0, 1, 2, REQUEUE, DO_NOT_REQUEUE, 128 + signal.SIGINT, 128 + signal.SIGTERM}


def test_every_fault_of_the_matrix_has_a_row_and_those_with_a_test_are_all_there() -> None:
    marks = re.findall(r"\| (F[\d, Fto]+)\|\n", (DOCS / "operate" / "faults.md").read_text())
    told = set()
    for mark in marks:
        numbers = [int(number) for number in re.findall(r"\d+", mark)]
        told |= set(range(numbers[0], numbers[1] + 1)) if "to" in mark else set(numbers)
    assert told == set(range(1, 31))
    tested = {
        int(n)
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def test_((?:f\d+_)+)", file.read_text())
        for n in re.findall(r"\d+", name)
    }
    assert tested <= told
    assert len(tested) > 20


def test_the_picture_of_states_has_all_states() -> None:
    states = set(JobState.__args__)  # type: ignore[attr-defined]
    assert {state for pair in transitions() for state in pair} == states
    assert ("training", "recovering") in transitions()
    assert ("recovering", "starting") in transitions()
    assert ("finished", "training") not in transitions()
    page = (DOCS / "concepts" / "processes.md").read_text()
    assert all(f"`{state}`" in page for state in states)

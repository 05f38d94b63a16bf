"""What the API answers is what its OpenAPI description says, whatever is sent: schemathesis asks every operation."""

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.checks import CheckFunction
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import negative_data_rejection

from tests.launcher.controller.serving import Served, serving

STREAM = "/api/watch"
"""It ends with the job, and no client of schemathesis waits for that."""
_SETTINGS = settings(
    max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def description(served: Served) -> BaseSchema:
    told = deepcopy(served.app.openapi())
    for methods in told["paths"].values():
        for operation in methods.values():
            del operation["security"]  # every request here shows the token; the other ones are in test_hardness
    return schemathesis.openapi.from_dict(told).exclude(path=STREAM)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_answers_are_as_described(served: Served, description: BaseSchema, mode: GenerationMode) -> None:
    """Status, content type, headers and schema; what is valid is taken, what is not is refused; never a 5xx."""
    token = {"Authorization": f"Bearer {served.token}"}
    asked = Counter[str]()

    def ask(case: Case) -> None:
        asked[case.operation.label] += 1
        # a parameter that a route does not know is passed over
        spared: list[CheckFunction] = [] if case.operation.body else [negative_data_rejection]
        case.call_and_validate(f"http://{served.address}", headers=token, excluded_checks=spared, timeout=30)

    for found in description.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not _takes_something(operation):
            continue  # nothing can be wrong with it
        _SETTINGS(given(operation.as_strategy(generation_mode=mode))(ask))()
    assert len(asked) >= (13 if mode is GenerationMode.POSITIVE else 7)
    assert served.lives()


def _takes_something(operation: Any) -> bool:
    return any(True for _ in operation.iter_parameters()) or bool(operation.body)


def test_every_operation_is_described_and_says_that_it_asks_for_the_token(served: Served) -> None:
    told = served.app.openapi()
    described = {(path, method.upper()) for path, methods in told["paths"].items() for method in methods}
    routes = served.routes()
    needs = {(path, method) for path, methods in routes for method in methods if path.startswith("/api/")}
    assert described == {pair for pair in needs if pair[0] != served.app.openapi_url}
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            assert operation["security"] == [{"HTTPBearer": []}], (path, method)
            assert {"401", "413", "422"} <= operation["responses"].keys(), (path, method)

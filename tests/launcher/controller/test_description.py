"""What the API answers is what its OpenAPI description says, whatever is sent: schemathesis asks every operation."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import BaseSchema

from tests.launcher.controller.serving import Served, serving

STREAM = "/api/watch"
"""It ends with the job, and no client of schemathesis waits for that."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def description(served: Served) -> BaseSchema:
    url = f"http://{served.address}{served.app.openapi_url}"
    found = schemathesis.openapi.from_url(url, headers={"Authorization": f"Bearer {served.token}"})
    return found.exclude(path=STREAM)


described = schemathesis.pytest.from_fixture("description")


@described.parametrize()
@settings(max_examples=15, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_described(served: Served, case: schemathesis.Case) -> None:
    case.call_and_validate(headers={"Authorization": f"Bearer {served.token}"}, timeout=30)


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

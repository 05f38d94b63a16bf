"""Whatever is sent to the API: no token, no answer; and no request that makes the controller fail.

The routes are those that the application has, not a list of them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from websockets.exceptions import InvalidStatus

from evermesh.launcher.metrics.node import NodeCollector
from evermesh.launcher.metrics.serving import MetricsServer
from tests.launcher.controller.serving import Served, serving

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
NEED_NO_TOKEN = {"/", "/static/{name}"}
"""The page and its files: what they show comes from the API."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def _filled(path: str) -> str:
    """The path of a route with something in the place of its parameters."""
    return path.replace("{node}", "node-0").replace("{rank}", "0").replace("{name}", "app.js")


@pytest.mark.parametrize("token", ["", "x", "\xfc"])
def test_every_route_but_the_page_refuses_whoever_has_no_token_whatever_the_method(served: Served, token: str) -> None:
    routes = served.routes()
    assert {path for path, _ in routes if not path.startswith("/api/")} == NEED_NO_TOKEN
    asked = 0
    for path in sorted({path for path, _ in routes} - NEED_NO_TOKEN):
        for method in METHODS:
            assert served.ask_raw(method, _filled(path), token)[0] == 401, (method, path)
            asked += 1
    assert asked >= 90
    assert served.job.controller.record.stop is None


def test_every_connection_of_an_agent_is_refused_without_the_token(served: Served) -> None:
    sockets = [path for path, methods in served.routes() if not methods]
    assert sockets == ["/api/agents/{node}"]
    for token in ("", "x", served.token[:-1]):
        with pytest.raises(InvalidStatus) as refused:
            served.agent(token)
        assert refused.value.response.status_code == 403


def test_methods_that_a_route_does_not_have_are_405(served: Served) -> None:
    for path, methods in served.routes():
        others = set(METHODS) - methods - ({"HEAD"} if path == served.app.openapi_url else set()) if methods else set()
        for method in others:
            assert served.ask_raw(method, _filled(path))[0] == 405, (method, path)


def test_bodies_that_are_too_long_are_refused_by_every_route_that_asks_for_the_token(served: Served) -> None:
    for path, methods in served.routes():
        for method in methods if path not in NEED_NO_TOKEN else ():
            assert served.ask_raw(method, _filled(path), body=b" " * (1 << 17))[0] == 413, (method, path)
    assert served.lives()


@pytest.mark.parametrize(
    "target",
    [
        *(f"/static/{up}token" for up in ("../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "....//", "/", "%2f", "%00/../")),
        *(f"/api/logs/{name}" for name in ("..%2ftoken", "../token", "0/../../token", "0%00", "%2e%2e", "0%2e%2e%2ftoken")),
        *(f"/api/logs/0?kind={kind}" for kind in ("../token", "..%2ftoken", "%00", "log%00")),
        *("//token", "/token", "/../token", "/..;/token", "/api/../token", "/%2e%2e/token", "/static", "/static/"),
    ],
)  # fmt: skip
def test_no_path_leads_out_of_what_is_served(served: Served, target: str) -> None:
    (served.job.run.logs / "rank-0.log").write_text("fine\n")
    status, body = served.ask_raw("GET", target)
    assert 400 <= status < 500, (status, body)
    assert served.token.encode() not in body


@pytest.mark.parametrize(
    "value", ["%00", "%ff", "%ed%a0%80", "%F0%9F%92%A5", "-1", "9" * 30, "1" * 5000, "%2e", "0x1", "\u0663"]
)
def test_odd_numbers_and_names_in_a_request_are_answered(served: Served, value: str) -> None:
    odd = quote(value, safe="%")
    for target in (
        f"/api/steps?after={odd}", f"/api/events?after={odd}", f"/api/journal?after={odd}", f"/api/journal?kind={odd}",
        f"/api/logs/{odd}", f"/api/logs/0?before={odd}", f"/api/logs/0?after={odd}", f"/static/{odd}", f"/api/{odd}",
    ):  # fmt: skip
        assert served.ask_raw("GET", target)[0] < 500, target
    assert served.lives()


@pytest.mark.parametrize(
    "text", ["\0", "\ud800", "\U0001f4a5", "a\r\nb", "../../token", "\x1b[2J", "x" * 300], ids=ascii
)
def test_odd_text_in_a_body_is_answered(served: Served, text: str) -> None:
    for path, wish in (
        ("/api/drain", {"node": text, "by": "me", "because": "fan"}),
        ("/api/drain", {"node": "node-7", "by": text, "because": text}),
        ("/api/relayout", {"changes": {text: 1}}),
        ("/api/relayout", {"changes": {"hdp": text}}),
        ("/api/relayout", {"changes": {"hdp": {text: [text]}}}),
        ("/api/stop", {text: text}),
    ):
        status, body = served.ask_raw("POST", path, body=json.dumps(wish).encode())
        assert status < 500, (path, body)
    assert served.lives()


@pytest.mark.parametrize("body", [b"\xff", b"\xfe\xff{}", b"[" * 20_000, b"1" * 20_000, b'{"a":' * 9_000, b"{}\0"])
def test_bodies_that_are_no_json_are_4xx(served: Served, body: bytes) -> None:
    for path in ("/api/stop", "/api/drain", "/api/relayout"):
        assert 400 <= served.ask_raw("POST", path, body=body)[0] < 500, path
    assert served.job.controller.record.stop is None


def test_the_numbers_of_a_node_are_for_who_shows_the_token_once(tmp_path: Path) -> None:
    server = MetricsServer(NodeCollector((tmp_path,)), token="sécret")
    node = Served.__new__(Served)
    node.address = server.at
    try:
        for method in METHODS:
            for token in ("", "x", "\xfc", "secret"):
                assert node.ask_raw(method, "/metrics", token)[0] == 401
        right = "sécret".encode().decode("latin-1")
        assert node.ask_raw("GET", "/metrics", right)[0] == 200
        assert {node.ask_raw(method, "/metrics", right)[0] for method in METHODS[1:]} == {405}
        for target in ("/", "/../token", "/metrics/..", "/metrics%00", "/%6detrics", "/metrics/"):
            assert node.ask_raw("GET", target, right)[0] == 404
    finally:
        server.close()

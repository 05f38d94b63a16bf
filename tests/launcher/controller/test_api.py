"""The controller's API refuses whoever has no token, and nothing that anybody sends ends the controller."""

import json
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress

import httpx2
import pytest
from websockets.exceptions import WebSocketException

from evermesh.launcher.contact import make_token
from tests.launcher.controller.serving import Served, serving

HELLO = {"kind": "hello", "node": "node-0", "host": "here", "address": "127.0.0.1", "pid": 100, "outcome": None}
TOO_LONG = 17 << 20


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


READS = [
    "/api/status",
    "/api/steps",
    "/api/events",
    "/api/journal",
    "/api/plan",
    "/api/metrics",
    "/api/metrics/targets",
]
ALL = [
    *[("GET", path) for path in READS],
    ("GET", "/api/openapi.json"),
    ("GET", "/api/watch"),
    ("GET", "/api/logs/{rank}"),
    ("GET", "/api/nothing"),
    ("POST", "/api/stop"),
    ("POST", "/api/save"),
    ("POST", "/api/relayout"),
    ("POST", "/api/drain"),
    ("POST", "/api/stacks"),
]


@pytest.mark.parametrize(("method", "path"), ALL)
@pytest.mark.parametrize("token", ["x", "a" * 100_000, "\xfc"])
def test_without_the_token_every_route_answers_401(served: Served, method: str, path: str, token: str) -> None:
    wrong = [(b"Authorization", f"Bearer {token}".encode("latin-1"))]
    for shown in (wrong, [], [(b"Authorization", served.token.encode())]):
        try:
            answer = httpx2.request(method, f"http://{served.address}{path}", headers=shown, trust_env=False)
        except httpx2.TransportError:
            assert shown == wrong, "only who still sends may find the connection closed"
            assert len(token) > 60_000
            continue
        assert answer.status_code in ((401, 431, 400) if len(token) > 60_000 else (401,))
    assert served.job.controller.record.stop is None


def test_every_route_that_there_is_was_asked(served: Served) -> None:
    paths = set(served.ask("GET", "/api/openapi.json").json()["paths"])
    assert paths <= {path for _, path in ALL}


@pytest.mark.parametrize("path", READS)
def test_with_the_token_reads_are_answered(served: Served, path: str) -> None:
    assert served.ask("GET", path).status_code == 200


@pytest.mark.parametrize("token", ["", "wrong"])
def test_an_agent_without_the_token_is_refused(served: Served, token: str) -> None:
    with pytest.raises(WebSocketException):
        served.agent(token)
    assert served.job.controller.nodes["node-0"].state == "joining"


def test_a_drain_that_cannot_be_is_refused_with_the_reason_and_nonsense_with_the_place(served: Served) -> None:
    wish = {"node": "node-7", "by": "me", "because": "fan"}
    refused = served.ask("POST", "/api/drain", json=wish)
    assert (refused.status_code, "has no node node-7; it has" in refused.json()["detail"]) == (409, True)
    for wrong in ({}, wish | {"node": ""}, wish | {"because": "x" * 1000}, wish | {"at": "once"}):
        assert served.ask("POST", "/api/drain", json=wrong).status_code == 422
    assert not served.job.controller.job.record.drained


def test_two_headers_of_which_one_is_right_are_refused(served: Served) -> None:
    headers = [("Authorization", f"Bearer {served.token}"), ("Authorization", "Bearer x")]
    answer = httpx2.request("GET", f"http://{served.address}/api/status", headers=headers, trust_env=False)
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "body",
    [
        "{", "[]", "7", '"stop"', '{"signal": 0}', '{"signal": 65}', '{"signal": 33}', '{"signal": "x"}', '{"how": 1}',
        '{"grace_s": -1}', '{"grace_s": NaN}', '{"grace_s": Infinity}', '{"at_once": "perhaps"}', "\xff", "[" * 10_000,
    ],
)  # fmt: skip
def test_what_is_no_request_to_stop_is_422_and_changes_nothing(served: Served, body: str) -> None:
    answer = served.ask("POST", "/api/stop", content=body.encode("latin-1"))
    assert answer.status_code == 422, answer.text
    assert served.job.controller.record.stop is None


@pytest.mark.parametrize("path", ["/api/steps?after=x", "/api/events?after=1e9", "/api/journal?after="])
def test_a_wrong_query_is_422(served: Served, path: str) -> None:
    assert served.ask("GET", path).status_code == 422


def test_a_body_that_is_too_long_is_refused_with_413(served: Served) -> None:
    assert served.ask("POST", "/api/stop", content=b" " * (1 << 17)).status_code == 413
    assert served.lives()


def test_of_a_request_without_the_token_no_body_is_waited_for(served: Served) -> None:
    host, port = served.address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"POST /api/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


MALFORMED: list[str | bytes] = [
    "", "{", "[]", "null", "\0", '{"kind": "nothing"}', '{"kind": "beat"}', json.dumps(HELLO | {"more": 1}),
    json.dumps(HELLO | {"pid": "x"}), json.dumps(HELLO | {"node": "node-1"}), b"\xff\xfe", b"{}", "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("first", MALFORMED, ids=range(len(MALFORMED)))
def test_an_agent_that_does_not_say_hello_properly_is_disconnected(served: Served, first: str | bytes) -> None:
    with served.agent() as agent:
        agent.send(first)
        with pytest.raises(WebSocketException):
            agent.recv(timeout=5)
    assert served.lives()
    assert served.job.controller.nodes["node-0"].state == "joining"


AFTER_HELLO: list[str | bytes] = [
    "{", b"\0\1", json.dumps({"kind": "preempted", "signal": 99}),
    json.dumps({"kind": "report", "generation": 0, "values": {"step": "x"}}),
    json.dumps({"kind": "progress", "outcome": {"generation": 0, "done": {"x": {}}}}),
    json.dumps({"kind": "beat", "generation": 0, "ranks": [{}], "memory_free_bytes": 1}), "x" * TOO_LONG,
]  # fmt: skip


@pytest.mark.parametrize("message", AFTER_HELLO, ids=range(len(AFTER_HELLO)))
def test_what_an_agent_says_wrong_ends_its_connection_and_nothing_else(served: Served, message: str | bytes) -> None:
    with served.agent(node="node-2") as agent:
        agent.send(json.dumps(HELLO | {"node": "node-2"}))
        with suppress(WebSocketException):  # it may be closed before all of it is sent
            agent.send(message)
        with pytest.raises(WebSocketException):
            agent.recv(timeout=5)
    assert served.lives()
    assert served.job.controller.record.stop is None


def test_the_token_is_readable_by_its_owner_only_and_an_empty_one_is_never_left(served: Served) -> None:
    path = served.job.run.directory / "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) > 40
    assert make_token(served.job.run.directory) == served.token
    assert served.token not in served.job.run.journal.read_text()


def test_the_page_and_its_files_hold_no_secret_and_need_no_token(served: Served) -> None:
    answer = httpx2.get(f"http://{served.address}/", trust_env=False)
    assert answer.status_code == 200
    assert served.token not in answer.text
    for path in ("/static/../token", "/static/%2e%2e%2ftoken", "/token", "/static/"):
        assert served.ask("GET", path).status_code == 404


def test_a_request_to_stop_is_taken_and_the_first_signal_and_the_shortest_grace_count(served: Served) -> None:
    for request in ({"signal": 15, "grace_s": 30}, {"signal": 2}, {"signal": 2, "grace_s": 10}, {"grace_s": 60}):
        assert served.ask("POST", "/api/stop", json=request).status_code == 202
    stop = served.job.controller.record.stop
    assert stop is not None
    assert (stop.signal, stop.at_once, stop.deadline_s) == (15, False, served.job.now_s + 10)

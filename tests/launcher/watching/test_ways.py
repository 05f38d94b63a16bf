"""What agents tell of connections, joined: which ways between ranks are cut or hold something, and whose they are."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from evermesh.fault.detectors.links import LinkWatch
from evermesh.launcher.agent.connection_watch import ConnectionWatch
from evermesh.launcher.controller.watching.ways import Ways
from evermesh.launcher.messages import FromAgentAdapter
from evermesh.launcher.watching.messages import Connections, Held


def _told(
    host: str, ends: dict[int, Sequence[tuple[str, str]]] | None, held: dict[int, tuple[str, str, int]]
) -> Connections:
    waiting = {
        rank: (Held(local=local, remote=remote, waiting_bytes=9000, resent=resent, segment_bytes=1448),)
        for rank, (local, remote, resent) in held.items()
    }
    told = Connections.model_validate({"generation": 1, "host": host, "ends": ends, "held": waiting})
    return _on_the_wire(told)


def _on_the_wire(told: Connections) -> Connections:
    heard = FromAgentAdapter.validate_json(told.model_dump_json())
    assert isinstance(heard, Connections)
    return heard


def test_a_way_is_cut_while_the_same_is_sent_again_and_ends_are_told_once() -> None:
    ways, links = Ways(2), LinkWatch()
    ways.take("node-0", _told("a", {0: [("10.0.0.1:5", "10.0.0.2:6")]}, {}))
    assert ways.seen() is None, "the other node has said nothing"
    ways.take("node-1", _told("b", {1: [("10.0.0.2:6", "10.0.0.1:5")]}, {}))
    for held, cut in (({}, set()), ({0: ("10.0.0.1:5", "10.0.0.2:6", 3)}, {(0, 1)}), ({}, set())):
        seen = ways.seen()
        if seen is None:
            ways.take("node-0", _told("a", None, held))
            ways.take("node-1", _told("b", None, {}))
            seen = ways.seen()
        assert seen is not None
        links.look(seen)
        assert links.cut == cut
    assert ways.seen() is None, "nobody has said anything new"


def test_addresses_of_the_machine_itself_are_of_one_machine() -> None:
    near = ("127.0.0.1:5", "127.0.0.1:6")
    for hosts, cut in ((("a", "a"), {(0, 1)}), (("a", "b"), set())):
        ways, links = Ways(2), LinkWatch()
        ways.take("node-0", _told(hosts[0], {0: [near]}, {0: (*near, 3)}))
        ways.take("node-1", _told(hosts[1], {1: [near[::-1]]}, {}))
        links.look(ways.seen() or {})
        assert links.cut == cut


_READS_NOTHING = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sys.stdin.read()
"""


@pytest.mark.skipif(shutil.which("ss") is None, reason="without ss of iproute2 there is nothing to tell")
def test_an_agent_tells_what_the_kernel_holds_of_its_ranks_and_not_more_often_than_it_may() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        other = subprocess.Popen([sys.executable, "-c", _READS_NOTHING, str(port)], stdin=subprocess.PIPE)
        with server.accept()[0] as connection:
            connection.setblocking(False)
            try:
                while True:
                    connection.send(bytes(1 << 16))
            except BlockingIOError:
                pass
            watch, links, ways = ConnectionWatch(1), LinkWatch(), Ways(1)
            first = watch.look({0: os.getpid(), 1: other.pid}, says_ends=False)
            assert first is not None
            assert first.ends is not None
            assert first.ends[1] == ((f"127.0.0.1:{connection.getpeername()[1]}", f"127.0.0.1:{port}"),)
            [held] = [one for one in first.held[0] if one.local == f"127.0.0.1:{port}"]
            assert held.waiting_bytes > 1 << 16
            assert held.resent == 0, "its receiver is slow, and answers"
            assert watch.look({0: os.getpid(), 1: other.pid}, says_ends=True) is None, "that was a moment ago"
            ways.take("node-0", _on_the_wire(first))
            links.look(ways.seen() or {})
            assert links._held[-1] == {(0, 1)}
            assert not links.cut
            until_s, again = time.monotonic() + 60.0, None
            while again is None and time.monotonic() < until_s:
                time.sleep(0.05)
                again = watch.look({0: os.getpid(), 1: other.pid}, says_ends=False)
            assert again is not None
            assert again.ends == first.ends, "somebody wanted to know it meanwhile"
        other.communicate()

"""Hosts in tests: network namespaces with addresses of their own, joined by a bridge in one more; Ray runs on each.

Needs root and iproute2. Processes of all hosts see one file system and one /dev/shm, as if every node mounted them.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.processes import variables

_START_WAIT_S = 60.0
_GCS_PORT = 6390
_PATIENT = {"health_check_failure_threshold": 60}
"""Ray gives up no host that is cut off for a while; by itself it would after 15 s."""


@dataclass(frozen=True, slots=True)
class Host:
    """One network namespace."""

    name: str
    address: str
    port: str
    """Its end of the cable at the bridge."""

    def command(self, *words: str) -> list[str]:
        """What runs ``words`` on it."""
        return ["ip", "netns", "exec", self.name, *words]

    @property
    def processes(self) -> list[psutil.Process]:
        """All that run on it."""
        found = []
        told = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False).stdout
        for pid in told.split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found


class Hosts:
    """Some hosts and the bridge between them."""

    def __init__(self, number: int) -> None:
        mark = secrets.token_hex(2)
        self._bridge = f"em{mark}sw"
        self.hosts = [Host(f"em{mark}h{index}", f"10.77.0.{index + 1}", f"em{mark}v{index}") for index in range(number)]

    def make(self) -> None:
        """Make namespaces, bridge and cables."""
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "br0", "up")
        for host in self.hosts:
            _ip("netns", "add", host.name)
            cable = ("type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("-n", self._bridge, "link", "add", host.port, *cable)
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for place, device in ((host.name, "lo"), (host.name, "eth0"), (self._bridge, host.port)):
                _ip("-n", place, "link", "set", device, "up")
            self.mend(host)

    def remove(self) -> None:
        """End all that runs on the hosts, and remove them."""
        for host in self.hosts:
            for process in host.processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        for name in (*(host.name for host in self.hosts), self._bridge):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def cut(self, host: Host) -> None:
        """Nothing passes any more between ``host`` and the others; nobody is told."""
        _ip("-n", self._bridge, "link", "set", host.port, "nomaster")

    @contextmanager
    def apart(self, one: Host, other: Host) -> Iterator[None]:
        """Nothing passes between these two for a while, though both reach everybody else; ``one`` is told at once."""
        route = ("unreachable", f"{other.address}/32")
        _ip("-n", one.name, "route", "add", *route)
        try:
            yield
        finally:
            _ip("-n", one.name, "route", "delete", *route)

    def mend(self, host: Host) -> None:
        """Everything passes again."""
        _ip("-n", self._bridge, "link", "set", host.port, "master", "br0")


def can_make_hosts() -> bool:
    """Whether network namespaces can be made here."""
    name = f"em{secrets.token_hex(3)}"
    with suppress(OSError):
        if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode == 0:
            _ip("netns", "delete", name)
            return True
    return False


@contextmanager
def ray_hosts(number: int, cpus: int = 2, head: Sequence[str] = ()) -> Iterator[Hosts]:
    """Hosts that are the nodes of one Ray cluster, the first its ``head``, with options of ``ray start`` of its own.

    Ray's own tokens are on.
    """
    hosts = Hosts(number)
    with ExitStack() as stack:
        stack.callback(hosts.remove)
        hosts.make()
        # Ray puts sockets into it, whose paths must be short
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True))
        authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        environment = {**os.environ, **authentication}
        start_head(hosts, cpus, folder, environment, "--system-config", json.dumps(_PATIENT), *head)
        join = ["--address", f"{hosts.hosts[0].address}:{_GCS_PORT}"]
        for number, host in enumerate(hosts.hosts[1:], 1):  # together they would be slower than Ray's patience
            _wait([_ray(host, cpus, [*join, "--temp-dir", f"{folder}/{number}"], environment)])
        with variables(**authentication):
            yield hosts


def start_head(hosts: Hosts, cpus: int, folder: str, environment: dict[str, str], *words: str) -> None:
    """Start the head of a cluster on the first host; returns when it is there. ``words`` go to ``ray start``."""
    dashboard = [] if "--dashboard-host" in words else ["--include-dashboard", "false"]
    own = ["--head", "--port", str(_GCS_PORT), "--temp-dir", f"{folder}/0", *dashboard, *words]
    _wait([_ray(hosts.hosts[0], cpus, own, environment)])


def on(hosts: Hosts) -> str:
    """The override with which a job runs there."""
    return f"on=ray://{hosts.hosts[0].address}:{_GCS_PORT}"


def _ray(host: Host, cpus: int, words: Sequence[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
    ray = str(Path(sys.executable).with_name("ray"))
    own = ["--node-ip-address", host.address, "--num-cpus", str(cpus), "--disable-usage-stats"]
    return subprocess.Popen(
        host.command(ray, "start", *own, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def _wait(started: "Sequence[subprocess.Popen[str]]") -> None:
    for process in started:
        output, _ = process.communicate(timeout=_START_WAIT_S)
        assert process.returncode == 0, output


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)

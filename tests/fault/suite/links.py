"""Faults of the network between ranks, each of which is in a network namespace of its own; needs root and iproute2."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.launcher.hosts import Host, Hosts

_NOBODY = "02:00:00:00:00:99"


@contextmanager
def hosts_of(number: int) -> Iterator[Sequence[Host]]:
    """So many namespaces on one bridge."""
    hosts = Hosts(number)
    try:
        hosts.make()
        yield hosts.hosts
    finally:
        hosts.remove()


def lay_cable(one: Host, other: Host) -> None:
    """What ``one`` and ``other`` send each other takes a cable of their own from now on."""
    cable = ("type", "veth", "peer", "name", "own", "netns", other.name)
    _run("ip", "-n", one.name, "link", "add", "own", *cable)
    for here in (one, other):
        _run("ip", "-n", here.name, "link", "set", "own", "up")
    for here, there in ((one, other), (other, one)):
        _run("ip", "-n", here.name, "route", "add", f"{there.address}/32", "dev", "own", "src", here.address)


def slow_down(one: Host, other: Host, bits_per_s: int) -> None:
    """The cable between them carries no more than that, in both directions."""
    limit = ("root", "tbf", "rate", f"{bits_per_s}bit", "burst", "4k", "latency", "2s")
    for host in (one, other):
        _run("tc", "-n", host.name, "qdisc", "replace", "dev", "own", *limit)


def lose(one: Host, other: Host) -> None:
    """Nothing that ``one`` sends arrives at ``other`` any more; what comes the other way does. Nobody is told."""
    _run(
        "ip",
        "-n",
        one.name,
        "neighbour",
        "replace",
        other.address,
        "lladdr",
        _NOBODY,
        "dev",
        "eth0",
        "nud",
        "permanent",
    )


def lose_no_more(one: Host, other: Host) -> None:
    """What ``one`` sends arrives at ``other`` again."""
    _run("ip", "-n", one.name, "neighbour", "delete", other.address, "dev", "eth0")


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=20)

"""DeepSpeed's hostfiles, and its filters of machines and slots; pure but for reading the file.

The file names every machine with its slots. The same command is started on each of them; which one this is, its names tell.
"""

import os
import re
import socket
from collections.abc import Collection
from pathlib import Path

from evermesh.launcher.scripts.errors import ScriptRefused
from evermesh.launcher.scripts.flags import CommandLine
from evermesh.launcher.scripts.schedulers import Told

_LOCAL = "localhost"
Slots = dict[str, tuple[int, ...]]
"""By machine, in the order of the file."""


def told_by_hostfile(line: CommandLine, own_names: Collection[str] | None = None) -> Told:
    """The machines of ``--hostfile``, less what ``--include`` and ``--exclude`` filter out; one of these flags is given.

    ``own_names``: what this machine is called; None: as it calls itself.

    Raises:
        ScriptRefused: the file or a filter is wrong, or this machine is not among the rest.
    """
    path, names = line.values.get("hostfile"), _own_names() if own_names is None else own_names
    hosts = _filtered(line, _read(line, path) if path else _here(line), path or "this machine")
    mine = [host for host in hosts if host in names] or ([_LOCAL] if list(hosts) == [_LOCAL] else [])
    if not mine:
        raise ScriptRefused(
            f"this machine ({', '.join(sorted(names))}) is none of {', '.join(hosts)}. Start the same command on each of "
            "these (pdsh, srun), by the names that the file has."
        )
    slots, order = hosts[mine[0]], list(hosts)
    source = line.spellings["hostfile"] if path else "--include"
    return Told(len(hosts), order.index(mine[0]), source, order[0], workers=len(slots), slots=slots)


def parse(text: str) -> Slots:
    """The machines of a hostfile.

    Raises:
        ValueError: a line is not ``HOST slots=N``, a machine is named twice, or there is none; says which.
    """
    found: Slots = {}
    for raw in text.splitlines():
        entry = raw.strip()
        if not entry or entry.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)", entry)
        if match is None:
            raise ValueError(f"{entry!r} is not HOST slots=N")
        if match[1] in found:
            raise ValueError(f"{match[1]} is named twice")
        found[match[1]] = tuple(range(int(match[2])))
    if not found:
        raise ValueError("it names no machine")
    return found


def select(hosts: Slots, text: str, *, excludes: bool) -> Slots:
    """What ``HOST@HOST:SLOT,SLOT`` leaves of ``hosts``: the machines and slots that it names, or all others.

    Raises:
        ValueError: it names what is not there; says what.
    """
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        host, colon, slots = part.partition(":")
        if host not in hosts:
            raise ValueError(f"there is no machine {host!r}; there are {', '.join(hosts)}")
        if colon and not re.fullmatch(r"\d+(,\d+)*", slots):
            raise ValueError(f"{part!r} is not HOST:SLOT,SLOT")
        wanted = set(map(int, slots.split(","))) if colon else set(hosts[host])
        if missing := wanted - set(hosts[host]):
            raise ValueError(f"{host} has no slot {min(missing)}; it has {len(hosts[host])}")
        named.setdefault(host, set()).update(wanted)
    left = {
        host: tuple(slot for slot in slots if (slot in named.get(host, ())) != excludes)
        for host, slots in hosts.items()
    }
    return {host: slots for host, slots in left.items() if slots}


def _read(line: CommandLine, path: str) -> Slots:
    try:
        return parse(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ScriptRefused(
            f"{line.spellings['hostfile']} {path}: {error}. Every line is a machine: worker-0 slots=8."
        ) from error


def _here(line: CommandLine) -> Slots:
    """Filters without a file are about this machine: as many slots as the highest that they name."""
    text = line.values.get("include") or line.values["exclude"]
    numbers = [int(number) for number in re.findall(r"[:,](\d+)", text)]
    return {_LOCAL: tuple(range(1 + max(numbers, default=0)))}


def _filtered(line: CommandLine, hosts: Slots, where: str) -> Slots:
    given = [name for name in ("include", "exclude") if name in line.values]
    if len(given) == 2:
        raise ScriptRefused("--include and --exclude exclude each other. Give one.")
    for name in given:
        try:
            hosts = select(hosts, line.values[name], excludes=name == "exclude")
        except ValueError as error:
            raise ScriptRefused(f"{line.spellings[name]} {line.values[name]}: {error} ({where}).") from error
    if not hosts:
        raise ScriptRefused(f"{line.spellings['exclude']} leaves no slot of {where}.")
    return hosts


def _own_names() -> set[str]:
    """Names and addresses of this machine."""
    import psutil  # only here: ranks wait for every import

    name = os.uname().nodename
    addresses = {
        found.address
        for of_name in psutil.net_if_addrs().values()
        for found in of_name
        if found.family in (socket.AF_INET, socket.AF_INET6) and not found.address.startswith("127.")
    }
    return {name, name.partition(".")[0], _LOCAL} | addresses

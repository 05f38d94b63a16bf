"""Who a node is, so that evidence finds it again and a re-used name is not blamed.

A node is called ``HOST/PLACE``. Where several agents share a machine the place is the name of the node in its job
(``trainer/node-1``); on nodes of a cluster it is their address (``gpu17/10.0.0.17``).
"""

import hashlib
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_MACHINE_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class NodeIdentity(BaseModel):
    """A node as evidence names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """HOST/PLACE."""
    machine: str = ""
    """Stays with the installation of a machine; empty where it has none, as in many containers."""
    boot: str = ""
    """This life of the machine; empty where it cannot be read."""

    def may_be(self, other: "NodeIdentity") -> bool:
        """Whether both are the same machine, as far as they tell: another one may have the name by now."""
        if self.name != other.name:
            return False
        if self.machine and other.machine:
            return self.machine == other.machine
        if self.boot and other.boot:
            return self.boot == other.boot
        return not (self.machine or other.machine)


def identity_of(node: str, address: str) -> NodeIdentity:
    """This machine as a node of a job, which calls it ``node`` and reaches it at ``address``."""
    place = node if address.startswith("127.") else address
    return NodeIdentity(name=f"{host_name()}/{place}", machine=machine_id(), boot=boot_id())


def covers(pattern: str, name: str) -> bool:
    """Whether ``pattern`` means the node ``name``: HOST/PLACE itself, all nodes of HOST, or the one with an address."""
    host, _, place = name.partition("/")
    return pattern in (name, host) or (pattern == place and "." in pattern)


def full_name(given: str) -> str:
    """What a person calls a node, as it is kept: ``node-1`` alone is that of this machine."""
    return f"{host_name()}/{given}" if given.startswith("node-") and "/" not in given else given


def host_name() -> str:
    """Of this machine."""
    return os.uname().nodename


def machine_id() -> str:
    """A digest of the identity of this machine, which is to be kept secret itself; empty where it has none."""
    for path in _MACHINE_IDS:
        if found := _read(path):
            return hashlib.blake2b(found.encode(), key=b"evermesh cluster store", digest_size=8).hexdigest()
    return ""


def boot_id() -> str:
    """Of this life of the machine; empty where it cannot be read."""
    return _read(_BOOT_ID)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

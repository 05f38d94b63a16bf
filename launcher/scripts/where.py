"""Where the ranks of a script run: on this machine, or here and on others that were started with the same command."""

import re
from typing import Literal

from pydantic import Field

from evermesh.launcher.scripts.errors import ScriptRefused
from evermesh.launcher.scripts.flags import CommandLine
from evermesh.launcher.scripts.schedulers import Told
from evermesh.launcher.scripts.values import Frozen, whole_number

_STATIC_PORT, _C10D_PORT = 29500, 29400
"""torchrun's defaults."""
_JOIN_TIMEOUT_S = 600.0
_WAY_OUT = (
    "Give --node-rank and the --master-addr of node 0 on every machine; without both, all nodes run on this machine."
)


class ThisMachine(Frozen):
    """One node, or several that run here as if they were machines."""

    kind: Literal["here"] = "here"
    nodes: int = Field(default=1, ge=1)
    master_addr: str = "localhost"
    master_port: int | None = Field(default=None, ge=1, le=65535)
    """Where rank 0 opens its store; None for a new free port in every generation."""


class Machines(Frozen):
    """One node per machine. This is one of them; the others are started by whoever started this one."""

    kind: Literal["machines"] = "machines"
    nodes: int = Field(ge=2)
    node_rank: int | None = None
    """Number of this one; None: as they come, and the one that ``master_addr`` belongs to is number 0."""
    node_rank_from: str = ""
    """The flag or variable that says so."""
    master_addr: str
    """Where node 0 waits for the others, and then rank 0 opens its store."""
    master_port: int = Field(ge=1, le=65535)
    key: str | None = None
    """Nodes that were given another one belong to another job."""
    join_timeout_s: float = _JOIN_TIMEOUT_S
    """How long all of them may take to come."""


def find_place(line: CommandLine, told: Told) -> ThisMachine | Machines:
    """What flags, ``PET_*`` variables and, where these say nothing, a hostfile or a scheduler (``told``) say about nodes.

    Raises:
        ScriptRefused: they contradict each other, or something is missing.
    """
    nodes = _count_nodes(line, told)
    host, port = _master(line, told, nodes)
    rank, source = _node_rank(line, told)
    if nodes == 1:
        if "node_rank" in line.values and rank:
            raise ScriptRefused(f"{source} is {rank}, but there is 1 node. Give --nnodes as well.")
        return ThisMachine(master_addr=host or "localhost", master_port=port)
    if host is None and rank is None:
        return ThisMachine(nodes=nodes, master_port=port)
    if host is None:
        raise ScriptRefused(f"node {rank} of {nodes} ({source}) does not know where node 0 is. {_WAY_OUT}")
    if rank is not None and rank >= nodes:
        raise ScriptRefused(f"{source} is {rank}, but {nodes} nodes have the numbers 0 to {nodes - 1}.")
    return Machines(
        nodes=nodes,
        node_rank=rank,
        node_rank_from=source,
        master_addr=host,
        master_port=port or (_C10D_PORT if line.values.get("rdzv_backend") == "c10d" else _STATIC_PORT),
        key=line.values.get("rdzv_id"),
        join_timeout_s=_join_timeout_s(line),
    )


def _count_nodes(line: CommandLine, told: Told) -> int:
    if "nnodes" not in line.values and told.nodes is not None:
        return told.nodes
    text = line.values.get("nnodes", "1")
    spelling = line.spellings.get("nnodes", "--nnodes")
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise ScriptRefused(f"{spelling} is {text!r}, which is neither N nor MIN:MAX with 1 <= MIN <= MAX.")
    if 1 < low < high:
        raise ScriptRefused(
            f"{spelling} asks for {low} to {high} nodes, but the number of nodes of a script is fixed. Give one number."
        )
    return low


def _master(line: CommandLine, told: Told, nodes: int) -> tuple[str | None, int | None]:
    """Where rank 0 opens its store, as far as it is said."""
    if "standalone" in line.values:
        return None, None
    backend, endpoint = line.values.get("rdzv_backend", "static"), line.values.get("rdzv_endpoint", "")
    is_alone = nodes == 1
    if backend not in ("static", "c10d") and not is_alone:
        raise ScriptRefused(
            f"{line.spellings['rdzv_backend']} is {backend!r}, but nodes meet without a server here. Leave it out. "
            + _WAY_OUT
        )
    if endpoint and (backend == "static" or not is_alone):
        return _address(line, endpoint, is_port_needed=backend == "static")
    port = whole_number(line, "master_port", 0)
    if port > 65535:
        raise ScriptRefused(f"{line.spellings['master_port']} is {port}. Ports end at 65535.")
    told = Told() if is_alone else told
    return line.values.get("master_addr", told.master_addr), port or told.master_port


def _address(line: CommandLine, endpoint: str, *, is_port_needed: bool) -> tuple[str, int | None]:
    host, colon, port = endpoint.rpartition(":")
    if not colon and not is_port_needed:
        return endpoint, None
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ScriptRefused(f"{line.spellings['rdzv_endpoint']} is {endpoint!r}, which is not HOST:PORT.")
    return host, int(port)


def _node_rank(line: CommandLine, told: Told) -> tuple[int | None, str]:
    """The number of this node, and who says so."""
    if "node_rank" in line.values and "standalone" not in line.values:
        return whole_number(line, "node_rank", 0), line.spellings["node_rank"]
    return told.node_rank, told.rank_from


def _join_timeout_s(line: CommandLine) -> float:
    """``join_timeout`` of ``--rdzv-conf``, or ``timeout`` as torchrun calls it with static addresses."""
    pairs = dict(pair.partition("=")[::2] for pair in line.values.get("rdzv_conf", "").split(",") if pair)
    for name in ("join_timeout", "timeout"):
        if name in pairs:
            if not pairs[name].isdecimal():
                raise ScriptRefused(f"{line.spellings['rdzv_conf']}: {name} is {pairs[name]!r}. Give whole seconds.")
            return float(pairs[name])
    return _JOIN_TIMEOUT_S

"""Looking at the nodes of a Ray cluster without a job: one actor on each, gone when this is over.

The code must be installed on every node.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evermesh.fault.health.probes.link import LinkResult, LinkServer, measure
from evermesh.fault.health.probes.pairs import Pair, rounds
from evermesh.fault.health.verdicts import Verdict
from evermesh.fault.snapshot.handshake import Address, new_nonce
from evermesh.launcher.doctor.sections import Found, check_machine
from evermesh.launcher.placement import ray_cluster as cluster

_LOOK_WAIT_S = 60.0
_FULL_WAIT_S = 900.0
"""The recorder may have to be built."""
_PAIR_S = 0.3
_PAIR_WAIT_S = 30.0


class NodeDoctor:
    """An actor that looks at its node, and is one end of connections to others."""

    def __init__(self) -> None:
        self._server: LinkServer | None = None

    def look(self, quick: bool) -> list[tuple[str, dict[str, Any]]]:
        """Sections and verdicts, as plain values."""
        return [(section, verdict.to_dict()) for section, verdict in check_machine(quick=quick)]

    def listen(self, secret: bytes) -> Address:
        """Serve link tests at the address by which the cluster knows this node."""
        self._server = LinkServer(ray.util.get_node_ip_address(), secret)
        return self._server.address

    def measure(self, address: Address, secret: bytes) -> LinkResult:
        """Test the connection to another node."""
        return measure(address, secret, _PAIR_S)


class ClusterDoctor:
    """The doctors of all nodes of the cluster that ``on`` names. A context manager.

    Raises:
        ClusterMissing: there is none.
    """

    def __init__(self, on: str) -> None:
        cluster.connect(on, f"evermesh-doctor-{new_nonce().hex()[:8]}")
        self.names: list[str] = []
        """Of the nodes: host name and address."""
        self._doctors: list[Any] = []
        for node in sorted(
            (node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"]
        ):
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            self.names.append(_name(node, self.names))
            self._doctors.append(ray.remote(NodeDoctor).options(num_cpus=0, scheduling_strategy=where).remote())

    def __enter__(self) -> "ClusterDoctor":
        return self

    def __exit__(self, *_: object) -> None:
        for doctor in self._doctors:
            ray.kill(doctor)
        ray.shutdown()

    def look(self, *, quick: bool) -> dict[str, list[Found]]:
        """What was found on each node, at the same time on all; a node that does not answer is bad."""
        asked = [doctor.look.remote(quick) for doctor in self._doctors]
        answers = _gather(asked, _LOOK_WAIT_S if quick else _FULL_WAIT_S)
        return {name: _found(answer) for name, answer in zip(self.names, answers, strict=True)}

    def connect_pairs(self) -> dict[Pair, LinkResult]:
        """Test connections between nodes, by their places in ``names``, in rounds in which each node has one."""
        secret = new_nonce()
        addresses = _gather([doctor.listen.remote(secret) for doctor in self._doctors], _LOOK_WAIT_S)
        results: dict[Pair, LinkResult] = {}
        for pairs in rounds(len(self._doctors)):
            asked = [self._doctors[a].measure.remote(addresses[b], secret) for a, b in pairs]
            for pair, answer in zip(pairs, _gather(asked, _PAIR_WAIT_S), strict=True):
                results[pair] = answer if isinstance(answer, LinkResult) else LinkResult(failed=str(answer))
        return results


def _name(node: Mapping[str, Any], taken: Sequence[str]) -> str:
    """Host name and address; with a mark of Ray's where several nodes share them."""
    name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    return f"{name} {node['NodeID'][:6]}" if name in taken else name


def _gather(asked: Sequence[Any], timeout_s: float) -> list[Any]:
    """The answers, or the errors in their places."""
    until = time.monotonic() + timeout_s
    answers: list[Any] = []
    for reference in asked:
        try:
            answers.append(ray.get(reference, timeout=max(0.1, until - time.monotonic())))
        except (RayError, OSError) as error:  # a node that is gone, or cannot import this, is an answer
            answers.append(error)
    return answers


def _found(answer: Any) -> list[Found]:
    if isinstance(answer, BaseException):
        reason = f"no answer: {(str(answer).strip() or type(answer).__name__).splitlines()[-1]}"
        way_out = "look at the node; Evermesh must be installed on every node of the cluster"
        return [Found("node", Verdict("answer", "bad", reason, {}, way_out))]
    return [Found(section, Verdict(**values)) for section, values in answer]

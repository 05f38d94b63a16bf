"""What an agent tells Prometheus: its machine, its ranks as seen from outside, and the memory that snapshots take."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client.metrics_core import Metric

from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.messages import RankBeat
from evermesh.launcher.metrics.families import gauge
from evermesh.launcher.metrics.node import NodeCollector, rank_families
from evermesh.launcher.metrics.serving import MetricsServer


class NodeNumbers:
    """Serves them from now on, where ``spec`` wants it, on the address of the node; the token of the run is asked for.

    ``missing_s``: seconds without a controller, None while there is one.
    """

    def __init__(self, spec: AgentSpec, token: str, missing_s: Callable[[], float | None]) -> None:
        self._node, self._missing_s = spec.node, missing_s
        self._told = _Told()
        self._server: MetricsServer | None = None
        if spec.metrics:
            try:
                collector = NodeCollector((spec.run,), self.families)
                host = spec.metrics_host or spec.address or "127.0.0.1"
                self._server = MetricsServer(collector, host, token=token)
            except OSError as error:
                print(f"no numbers of this node are served: {error}", flush=True)

    @property
    def at(self) -> str | None:
        """Host and port where they are served."""
        if self._server is None:
            return None
        return self._server.at

    def tell(self, beats: tuple[RankBeat, ...], snapshot_bytes: int) -> None:
        """What is true from now on."""
        self._told = _Told(beats, snapshot_bytes)

    def close(self) -> None:
        """Serve no more."""
        if self._server is not None:
            self._server.close()

    def families(self) -> Iterator[Metric]:
        """What is told beside the numbers of the machine."""
        told = self._told
        yield from rank_families(self._node, told.beats)
        yield from gauge(
            "agent_snapshot_bytes", "Memory that keepers here hold snapshots and parity in.", told.snapshot_bytes
        )
        missing_s = self._missing_s()
        yield from gauge(
            "agent_without_controller_seconds", "Since it lost its controller; 0: it has one.", missing_s or 0.0
        )


class _Told(NamedTuple):
    beats: tuple[RankBeat, ...] = ()
    snapshot_bytes: int = 0

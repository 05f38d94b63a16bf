"""The rendezvous store: it outlives attempts, keeps their keys apart, and listens where it should only."""

from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from evermesh.launcher.agent import warm
from evermesh.launcher.agent.store import StoreProcess
from tests.launcher.agent.test_worker_group import Running


@pytest.fixture
def store() -> StoreProcess:
    warm.warm_up("evermesh.launcher.agent.training", threads=1)
    return StoreProcess("127.0.0.1")


def test_it_listens_on_the_address_of_its_node_only(store: StoreProcess) -> None:
    listening = [
        connection.laddr.ip
        for child in psutil.Process().children(recursive=True)
        for connection in child.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == store.address.port
    ]
    store.close()
    assert listening == ["127.0.0.1"]


def test_keys_of_one_generation_are_not_seen_by_the_next(store: StoreProcess, tmp_path: Path) -> None:
    """Workers of two generations write and count under the same names."""
    found = []
    for generation in (1, 2):
        job = Running("meet", 2, tmp_path, generation=generation, store=store.address)
        found.append(job.until(lambda seen: seen.is_over).done)
        job.close()
    client = dist.TCPStore(store.address.host, store.address.port, is_master=False)
    keys = [f"generation-{generation}/arrived" for generation in (1, 2)]
    counts = [int(client.get(key)) for key in keys]
    store.close()
    assert [sorted(values["arrived"] for values in done.values()) for done in found] == [[1, 2], [1, 2]]
    assert counts == [2, 2]


def test_it_ends_with_its_owner(store: StoreProcess) -> None:
    assert store.is_alive
    store.close()
    assert not store.is_alive

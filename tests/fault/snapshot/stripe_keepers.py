"""Keepers of several nodes that form one stripe, with what ranks would have left there; real processes, ended for certain."""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from evermesh.checkpoint.committing import data_name
from evermesh.fault.snapshot.choosing import Version
from evermesh.fault.snapshot.keeper.client import KeeperClient
from evermesh.fault.snapshot.keeper.parity import buffer_of, protected_in
from evermesh.fault.snapshot.keeper.process import KeeperProcess
from evermesh.fault.snapshot.keeper.slots import NUM_SLOTS, Header, SlotFiles, held_by, ranks_in
from tests.fault.snapshot.keepers import WAIT_S, keeper_of, kill_keeper

HOST, SECRET, MAP = "127.0.0.1", "5a" * 32, "a" * 32


class Part(NamedTuple):
    """Bytes [start, stop) of a tensor of ``num_bytes``, whose content follows from its name and the step."""

    name: str
    num_bytes: int
    start: int
    stop: int

    def content(self, step: int) -> bytes:
        return random.Random(f"{self.name} {step}").randbytes(self.num_bytes)[self.start : self.stop]


HEAD_BYTES = 123
"""Of a data file with tensors, in front of them."""
Data: TypeAlias = int | tuple[Part, ...]
"""Of a rank: so many bytes (0: it has no data), or parts of tensors."""


class Stripe:
    """Nodes with the data of their ranks, and their keepers."""

    def __init__(self, folder: Path, code: str, sizes: Sequence[Sequence[Data]]) -> None:
        self.code, self.sizes, self._folder = code, sizes, folder
        self._stack, self.keepers = ExitStack(), dict[int, KeeperProcess]()
        first = 0
        self.ranks: list[range] = []
        for of_node in sizes:
            self.ranks.append(range(first, first + len(of_node)))
            first += len(of_node)
        self.epoch = 0
        self.spoiled: tuple[int, int] | None = None
        """A rank, and the byte of its data that is wrong in what it leaves."""

    def start(self, node: int, slots: int = NUM_SLOTS) -> None:
        """Start the keeper of a node."""
        self.keepers[node] = self._stack.enter_context(keeper_of(self._folder, f"node-{node}", slots=slots))

    def area(self, node: int) -> Path:
        return self.keepers[node].area

    def client(self, node: int) -> KeeperClient:
        return KeeperClient(self.area(node), WAIT_S)

    def lose(self, node: int, *, memory: bool = True) -> None:
        """Kill the keeper, remove its memory too, and start another."""
        process = self.keepers[node]
        first = kill_keeper(process.area)

        def is_another() -> bool:
            process.look()
            identity = process.identity
            return identity is not None and identity.pid != first

        wait(is_another)
        self.client(node).close()
        if memory:
            for folder in (*process.area.glob("rank-*"), *process.area.glob("parity-*")):
                shutil.rmtree(folder)

    def join(self, nodes: Sequence[int] | None = None, **changes: Any) -> list[dict[str, Any]]:
        """Have all keepers take their places; the answers."""
        self.epoch += 1
        clients = [self.client(node) for node in range(len(self.sizes))]
        ports = [client.ask("listen", WAIT_S, host=HOST)["port"] for client in clients]
        told = {
            "epoch": self.epoch,
            "stripe": "stripe-0",
            "code": self.code,
            "addresses": [(HOST, port) for port in ports],
            "secret": SECRET,
            "bytes_per_s": None,
        } | changes
        chosen = range(len(self.sizes)) if nodes is None else nodes
        return [clients[node].ask("join", WAIT_S, **told, member=node, ranks=list(self.ranks[node])) for node in chosen]

    def take(self, step: int, nodes: Sequence[int] | None = None, generation: int = 1) -> Version:
        """Ranks of these nodes copy and have sealed; returns without waiting for the protection."""
        for node in range(len(self.sizes)) if nodes is None else nodes:
            client = self.client(node)
            for rank, data in zip(self.ranks[node], self.sizes[node], strict=True):
                _reserve(client, generation, rank, data)
                number = _write(self.area(node), rank, data, step)
                if self.spoiled is not None and self.spoiled[0] == rank:
                    flip(SlotFiles.of(self.area(node), rank, number).data, self.spoiled[1])
                answer = client.ask("seal", WAIT_S, generation=generation, rank=rank, slot=number, step=step)
                assert answer["ok"], answer
        return Version(generation, step, MAP)

    def states(self, version: Version) -> set[str]:
        """The states of all slots with a snapshot."""
        return {
            held.state
            for node in self.keepers
            for rank in self.ranks[node]
            for held in held_by(self.area(node), rank)
            if held.record.version == version
        }

    def protect(self, step: int) -> Version:
        """Take a snapshot, and wait until it is protected."""
        version = self.take(step)
        wait(lambda: self.states(version) == {"protected"})
        wait(lambda: all(version in [one.version for one in protected_in(self.area(node))] for node in self.keepers))
        return version

    def rebuild(self, version: Version, nodes: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Have all keepers rebuild a snapshot together; the answers, by node."""
        told = next(
            one for node in self.keepers for one in protected_in(self.area(node)) if one.version == version
        ).values()
        clients = [self.client(node) for node in (range(len(self.sizes)) if nodes is None else nodes)]
        for client in clients:
            client.tell("rebuild", epoch=self.epoch, version=version, protected=told)
        return [answer_of(client) for client in clients]

    def digests(self, version: Version) -> Mapping[str, str]:
        """Of every file of every slot with a snapshot, whatever slot that is, and of the parity and record of every node."""
        found = {}
        for node in self.keepers:
            area = self.area(node)
            for rank in ranks_in(area):
                for held in held_by(area, rank):
                    if held.record.version == version:
                        files = SlotFiles.of(area, rank, held.number)
                        found[f"{rank} record"] = str(held.record)
                        for file in (files.data, files.index, files.objects):
                            found[f"{rank} {file.name}"] = _digest(file) if file.is_file() else "-"
            buffer = buffer_of(area, version)
            if buffer is not None:
                found[f"{node} record of the stripe"] = hashlib.sha256(buffer.record()).hexdigest()
        return found

    def close(self) -> None:
        self._stack.close()


@contextmanager
def stripe_of(folder: Path, code: str, sizes: Sequence[Sequence[Data]]) -> Iterator[Stripe]:
    """Keepers that have joined; nothing of them is left at the end."""
    stripe = Stripe(folder, code, sizes)
    try:
        for node in range(len(sizes)):
            stripe.start(node)
        assert all(answer["ok"] for answer in stripe.join())
        yield stripe
    finally:
        stripe.close()


def answer_of(client: KeeperClient) -> dict[str, Any]:
    """The next answer."""
    found: list[dict[str, Any]] = []

    def has_come() -> bool:
        found.extend(client.answers())
        return bool(found)

    wait(has_come)
    return found[0]


def wait(holds: Callable[[], bool]) -> None:
    """Return as soon as it holds."""
    until = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def flip(file: Path, at: int) -> None:
    """Change one bit."""
    with file.open("r+b") as opened:
        opened.seek(at)
        before = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([before ^ 4]))


def _reserve(client: KeeperClient, generation: int, rank: int, data: Data) -> None:
    size, extents = num_bytes_of(data), dict[str, list[dict[str, object]]]()
    offset = HEAD_BYTES
    for part in data if isinstance(data, tuple) else ():
        region = {"offsets": [0], "sizes": [part.num_bytes]}
        place = {"file": data_name(rank), "offset": offset, "region": region, "start": part.start, "stop": part.stop}
        extents.setdefault(part.name, []).append(place)
        offset += part.stop - part.start
    told = {"generation": generation, "rank": rank, "shard_map": MAP, "data_bytes": size}
    assert client.ask("reserve", WAIT_S, **told, tensor_bytes=size, extents=extents)["ok"]


def num_bytes_of(data: Data) -> int:
    """Of the data file of a rank."""
    return HEAD_BYTES + sum(part.stop - part.start for part in data) if isinstance(data, tuple) else data


def _write(area: Path, rank: int, data: Data, step: int) -> int:
    """As a rank does, into the slot with the older snapshot; its number."""
    held = {one.number: one.record.step for one in held_by(area, rank)}
    number = min((0, 1), key=lambda number: held.get(number, -1))
    files = SlotFiles.of(area, rank, number)
    header = Header(files.header)
    header.begin(step)
    header.close()
    if data:
        alone = random.Random(f"{rank} {step}").randbytes(HEAD_BYTES if isinstance(data, tuple) else data)
        parts = data if isinstance(data, tuple) else ()
        with files.data.open("r+b") as opened:
            opened.write(alone + b"".join(part.content(step) for part in parts))
    files.objects.write_text(json.dumps({"objects": {"step": step}, "description": {"rank": rank}}))
    return number


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

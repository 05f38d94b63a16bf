"""GB/s of data that one core encodes and repairs, with each engine, next to the Python packages that do the same.

Per second of the processor's time for this thread, so that other processes cost less; buffers as they come from
``staggered_buffers``. ``SIZE_MB`` (192) MiB of data. pyeclib's own interface and zfec are measured where they are
installed.
"""

import importlib.util
import os
import time
from collections.abc import Callable

import numpy as np

from evermesh.fault.snapshot.coding import Code, Coder, EngineUnusable, choose_engine, staggered_buffers
from tests.benchmarks.harness import Row, exact_row

_BYTES = int(os.environ.get("SIZE_MB", "192")) << 20
_ROUNDS = 7
_PEER_ROUNDS = 2
_CODES = (Code(3, 1), Code(7, 1), Code(4, 2), Code(6, 2), Code(5, 3))
_GOALS = {("isal", 1): 12.0, ("isal", 2): 10.0, ("numpy", 1): 10.0, ("numpy", 2): 2.0}


def run() -> list[Row]:
    """Encode and repair, per code and engine."""
    rows = []
    for code in _CODES:
        parts = staggered_buffers(code.parts, _BYTES // code.data)
        for part in parts[: code.data]:
            np.frombuffer(part, np.uint8)[:] = np.random.default_rng(0).integers(0, 256, part.nbytes, np.uint8)
        peers = _peers(code, [bytes(part) for part in parts[: code.data]])
        for name in ("isal", "numpy"):
            try:
                coder = Coder(code, choose_engine(name).engine)
            except EngineUnusable as error:
                print(error)
                continue
            rows += _rows(code, name, coder, parts, peers)
    return rows


def _rows(code: Code, name: str, coder: Coder, parts: list[memoryview], peers: dict[str, float]) -> list[Row]:
    data, parity = parts[: code.data], parts[code.data :]
    lost = range(min(code.parity, code.data))
    left = {part: parts[part] for part in range(len(lost), code.parts)}
    encoded = _speed(lambda: coder.encode(data, parity), _ROUNDS)
    repaired = _speed(lambda: coder.decode(left, {part: parts[part] for part in lost}), _ROUNDS)
    goal = _GOALS.get((name, code.parity))
    compared = peers or {"": 0.0}
    rows = [
        exact_row(f"encode {code}, {name}", encoded, "GB/s", goal=goal, peer=peer or None, peer_value=speed or None)
        for peer, speed in compared.items()
    ]
    return [*rows, exact_row(f"repair {len(lost)} of {code}, {name}", repaired, "GB/s")]


def _peers(code: Code, data: list[bytes]) -> dict[str, float]:
    found = {}
    if importlib.util.find_spec("pyeclib"):
        from pyeclib.ec_iface import ECDriver

        driver = ECDriver(k=code.data, m=code.parity, ec_type="isa_l_rs_cauchy")
        whole = b"".join(data)
        found["pyeclib isa_l_rs_cauchy"] = _speed(lambda: driver.encode(whole), _PEER_ROUNDS)
    if importlib.util.find_spec("zfec"):
        import zfec

        encoder = zfec.Encoder(code.data, code.parts)
        found["zfec"] = _speed(lambda: encoder.encode(data), _PEER_ROUNDS)
    return found


def _speed(work: Callable[[], object], rounds: int) -> float:
    """GB/s of data, of the best round."""
    seconds = []
    for _ in range(rounds):
        started_s = time.thread_time()
        work()
        seconds.append(time.thread_time() - started_s)
    return _BYTES / 1e9 / min(seconds)

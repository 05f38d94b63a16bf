"""A disk: what was written is read back and compared, with the speed of both."""

import errno
import os
import tempfile
import time
from pathlib import Path

import xxhash

from evermesh.fault.health.verdicts import State, Verdict

_CHUNK = 1 << 20
_SLOW_BYTES_PER_S = 20e6


def probe_disk(folder: Path, num_bytes: int = 64 << 20, budget_s: float = 3.0) -> Verdict:
    """Write up to ``num_bytes`` for half of the time, have them on disk, and read them past the cache; nothing is left."""
    check = f"disk test of {folder}"
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            written, write_s, sync_s = _write(file.fileno(), num_bytes, budget_s / 2)
            is_same, read_s = _read_back(file.fileno(), written)
    except OSError as error:
        state: State = "warn" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENOENT) else "bad"
        return Verdict(check, state, f"{error.strerror or error}", {}, "look at the mount, its rights and its room")
    total = written[1]
    numbers = {
        "bytes": float(total),
        "write_bytes_per_s": total / (write_s + sync_s),
        "sync_s": sync_s,
        "read_bytes_per_s": total / read_s,
    }
    return judge(check, is_same, numbers)


def judge(check: str, is_same: bool, numbers: dict[str, float]) -> Verdict:
    """Pure."""
    speeds = (
        f"{numbers['write_bytes_per_s'] / 1e6:,.0f} MB/s written, {numbers['read_bytes_per_s'] / 1e6:,.0f} MB/s read"
    )
    if not is_same:
        reason = f"of {numbers['bytes']:,.0f} bytes that were written some were read back wrong"
        return Verdict(check, "bad", reason, numbers, "take the node out and check disk and controller (smartctl -a)")
    if numbers["write_bytes_per_s"] < _SLOW_BYTES_PER_S:
        return Verdict(
            check, "warn", f"slow: {speeds}", numbers, "see what else writes there (iotop), or choose another"
        )
    return Verdict(check, "ok", f"{numbers['bytes'] / 1e6:,.0f} MB were read back as written; {speeds}", numbers)


def _write(descriptor: int, num_bytes: int, budget_s: float) -> tuple[tuple[str, int], float, float]:
    """Digest and number of the bytes that were written, seconds for that, and until they were on disk."""
    digest, total, began_s, chunk = xxhash.xxh3_128(), 0, time.monotonic(), os.urandom(_CHUNK)
    while total < num_bytes and time.monotonic() - began_s < budget_s:
        part = total.to_bytes(8, "little") + chunk[8:]  # no two alike: a disk that deduplicates has to store them
        view = memoryview(part)
        while view:
            view = view[os.write(descriptor, view) :]
        digest.update(part)
        total += len(part)
    write_s = time.monotonic() - began_s
    os.fsync(descriptor)
    return (digest.hexdigest(), total), write_s, time.monotonic() - began_s - write_s


def _read_back(descriptor: int, written: tuple[str, int]) -> tuple[bool, float]:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(descriptor, 0, os.SEEK_SET)
    digest, began_s = xxhash.xxh3_128(), time.monotonic()
    while part := os.read(descriptor, _CHUNK):
        digest.update(part)
    return digest.hexdigest() == written[0], max(1e-9, time.monotonic() - began_s)

"""What the readings of NVML say of GPUs: pure functions. A field that a GPU does not support is no failure."""

from collections.abc import Iterator
from statistics import median

from evermesh.fault.health.gpu.reading import Gpu, GpusReading
from evermesh.fault.health.verdicts import State, Verdict

_MOST_PAGES = 10
"""Retired pages with which a GPU is changed."""
_BUSY_STATE = 2
"""Performance states in which PCIe runs as fast as it can."""
_NEAR_LIMIT_C = 3
_LINK_LIMITS = {"replay": 100, "recovery": 1, "flit CRC": 100, "data CRC": 100}
"""By kind: errors since the first look that are worth a word."""


def judge_gpus(now: GpusReading, first: GpusReading | None = None) -> list[Verdict]:
    """All verdicts about GPUs. ``first``: at the first look of this watch, for what is counted; None: this is the first."""
    if first is not None and len(now.gpus) < len(first.gpus):
        why = now.why_none or "the driver does not list the others"
        reason = f"{len(now.gpus)} of {len(first.gpus)} GPUs are left: {why}"
        return [Verdict("GPUs", "bad", reason, {"gpus": float(len(now.gpus))}, "dmesg tells why; reboot the node")]
    if now.why_none:
        return [Verdict("GPUs", "ok", f"none: {now.why_none}")]
    before = {gpu.index: gpu for gpu in first.gpus} if first else {}
    fact = f"{len(now.gpus)}, driver {now.driver}"
    found = [Verdict("GPUs", "ok", fact, {"gpus": float(len(now.gpus))})]
    for gpu in now.gpus:
        found += _gpu(gpu, before.get(gpu.index), _usual_links(now, gpu.name))
    return found


def _usual_links(now: GpusReading, name: str) -> float:
    """NVLink connections that are up on most GPUs of the same kind."""
    return median(sum(link.is_up for link in gpu.links) for gpu in now.gpus if gpu.name == name)


def _gpu(gpu: Gpu, first: Gpu | None, usual_links: float) -> Iterator[Verdict]:
    if gpu.lost:
        way_out = "dmesg tells why (Xid 79: fallen off the bus); reboot the node"
        yield Verdict(f"GPU {gpu.index}", "bad", f"does not answer: {gpu.lost}", {}, way_out)
        return
    yield Verdict(f"GPU {gpu.index}", "ok", f"{gpu.name} at {gpu.bus}")
    yield _memory(gpu)
    yield _speed(gpu)
    yield _pcie(gpu)
    if gpu.links:
        yield _links(gpu, first, usual_links)


def _memory(gpu: Gpu) -> Verdict:
    check = f"GPU {gpu.index} memory"
    numbers = _numbers(
        corrected=gpu.corrected,
        uncorrected=gpu.uncorrected,
        uncorrected_ever=gpu.uncorrected_ever,
        rows_replaced=gpu.rows_replaced,
        pages_retired=gpu.pages_retired,
    )
    if gpu.row_failed:
        return Verdict(check, "bad", "a bad row could not be replaced", numbers, "have the GPU changed")
    if gpu.uncorrected:
        reason = f"{gpu.uncorrected} errors could not be corrected: what was computed there may be wrong"
        return Verdict(
            check, "bad", reason, numbers, "reset the GPU (nvidia-smi -r); if they come back, have it changed"
        )
    if (gpu.pages_retired or 0) > _MOST_PAGES:
        reason = f"{gpu.pages_retired} pages are retired, more than {_MOST_PAGES}"
        return Verdict(check, "bad", reason, numbers, "have the GPU changed")
    if gpu.row_pending:
        return Verdict(check, "warn", "a bad row waits for its replacement", numbers, "reset the GPU when no job runs")
    if gpu.corrected is None:
        return Verdict(check, "ok", "this GPU has no ECC, or it is off", numbers)
    return Verdict(check, "ok", f"{gpu.corrected:,} errors were corrected, none was left", numbers)


def _speed(gpu: Gpu) -> Verdict:
    check = f"GPU {gpu.index} speed"
    numbers = _numbers(clock_mhz=gpu.clock_mhz, temperature_c=gpu.temperature_c, power_w=gpu.power_w)
    numbers |= _numbers(most_clock_mhz=gpu.most_clock_mhz, power_limit_w=gpu.power_limit_w)
    at = f"{_or_unknown(gpu.clock_mhz)} MHz, {_or_unknown(gpu.temperature_c)} °C, {_or_unknown(gpu.power_w)} W"
    if gpu.throttles:
        return Verdict(
            check, "warn", f"slowed down: {', '.join(gpu.throttles)}; {at}", numbers, "look at cooling and power"
        )
    if gpu.slowdown_c and (gpu.temperature_c or 0) >= gpu.slowdown_c - _NEAR_LIMIT_C:
        reason = f"{gpu.temperature_c} °C, and slows down at {gpu.slowdown_c} °C"
        return Verdict(check, "warn", reason, numbers, "look at the cooling")
    if gpu.power_limit_w and gpu.default_power_limit_w and gpu.power_limit_w < gpu.default_power_limit_w - 1:
        reason = f"may use {gpu.power_limit_w:.0f} of {gpu.default_power_limit_w:.0f} W; {at}"
        return Verdict(
            check, "warn", reason, numbers, f"nvidia-smi -pl {gpu.default_power_limit_w:.0f}, if it is not meant"
        )
    return Verdict(check, "ok", at, numbers)


def _pcie(gpu: Gpu) -> Verdict:
    check = f"GPU {gpu.index} PCIe"
    numbers = _numbers(generation=gpu.pcie_generation, width=gpu.pcie_width)
    if gpu.pcie_width is None or gpu.pcie_generation is None:
        return Verdict(check, "ok", "not supported: generation and width", numbers)
    most_width, most_generation = gpu.pcie_most_width or 0, gpu.pcie_most_generation or 0
    is_busy = gpu.performance_state is not None and gpu.performance_state <= _BUSY_STATE
    fact = f"generation {gpu.pcie_generation} of {most_generation}, {gpu.pcie_width} of {most_width} lanes"
    is_slow = gpu.pcie_width < most_width or (is_busy and gpu.pcie_generation < most_generation)
    state: State = "warn" if is_slow else "ok"
    return Verdict(check, state, fact, numbers, "look at slot, riser and BIOS" if is_slow else "")


def _links(gpu: Gpu, first: Gpu | None, usual: float) -> Verdict:
    check = f"GPU {gpu.index} NVLink"
    up = sum(link.is_up for link in gpu.links)
    before = sum(link.is_up for link in first.links) if first else up
    new = {kind: _errors(gpu, kind) - (_errors(first, kind) if first else 0) for kind in _LINK_LIMITS}
    numbers = {"up": float(up)} | {f"{kind} errors": float(count) for kind, count in new.items()}
    if up < before:
        reason = f"{up} connections are up, and {before} were"
        return Verdict(check, "bad", reason, numbers, "dmesg tells more (Xid 74); reset the GPUs, or reboot the node")
    if up < usual:
        reason = f"{up} connections are up, and {usual:g} on the other GPUs"
        return Verdict(check, "warn", reason, numbers, "nvidia-smi nvlink -s; look at bridges and switches")
    if first is not None and any(new[kind] >= limit for kind, limit in _LINK_LIMITS.items()):
        told = ", ".join(f"{count:,} {kind}" for kind, count in new.items() if count >= _LINK_LIMITS[kind])
        return Verdict(
            check, "warn", f"errors since the first look: {told}", numbers, "nvidia-smi nvlink -e; look at it"
        )
    return Verdict(check, "ok", f"{up} of {len(gpu.links)} connections are up", numbers)


def _errors(gpu: Gpu, kind: str) -> int:
    return sum(link.errors.get(kind, 0) for link in gpu.links)


def _numbers(**told: float | None) -> dict[str, float]:
    return {name: float(value) for name, value in told.items() if value is not None}


def _or_unknown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f}"

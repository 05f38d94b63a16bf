"""Network interfaces and InfiniBand ports: links that are down, flap, count errors, or are slower than they were."""

from collections.abc import Iterator

from evermesh.fault.health.host.files import FileCheck, Files, Look, names, number
from evermesh.fault.health.verdicts import Verdict, unreadable

_NET, _IB = "sys/class/net", "sys/class/infiniband"
_IS_UP, _IS_LOOPBACK = 0x1, 0x8
"""Bits of ``flags``: somebody has switched it on; it goes nowhere."""
_FLAPS = 4
"""Changes of the carrier since the first look: down and up again, twice."""
_LEAST = 100
_SHARES = {"errors": 1e-4, "dropped": 1e-2}
"""Of packets since the first look, at least ``_LEAST``: wrong ones, and those for which there was no room or nobody."""
_IB_COUNTERS = {"symbol_error": 120, "link_error_recovery": 2, "link_downed": 1, "port_rcv_errors": 100}
"""By counter: how many more since the first look are worth a word."""


def judge_interfaces(look: Look) -> list[Verdict]:
    """Every interface that is a device, or that was switched on, but the loopback."""
    wanted = [name for name in names(look.now, _NET) if _is_wanted(look.now, name)]
    if not wanted:
        return [unreadable("network", f"no interface in /{_NET}")]
    return [_interface(look, name) for name in wanted]


def _is_wanted(files: Files, name: str) -> bool:
    flags = number(files, f"{_NET}/{name}/flags") or 0
    return not flags & _IS_LOOPBACK and bool(flags & _IS_UP) and f"{_NET}/{name}/device/uevent" in files


def _interface(look: Look, name: str) -> Verdict:
    check = f"network {name}"
    told = {key: _of(look.now, name, key) for key in ("carrier", "carrier_changes", "speed")}
    first = look.first or look.now
    new = {kind: _both_ways(look.now, name, kind) - _both_ways(first, name, kind) for kind in (*_SHARES, "packets")}
    flaps = (told["carrier_changes"] or 0) - (_of(first, name, "carrier_changes") or 0)
    speed, speed_before = told["speed"] or 0, _of(first, name, "speed") or 0
    numbers = {kind: float(count) for kind, count in new.items()} | {"carrier_changes": float(flaps)}
    numbers |= {"speed_mbit_s": float(speed)} if speed > 0 else {}
    if not told["carrier"]:
        had_one = bool(_of(first, name, "carrier"))
        reason = "the link is down" + (", and was up before" if had_one else ", though the interface is switched on")
        return Verdict(check, "bad" if had_one else "warn", reason, numbers, "look at cable, module and switch port")
    if flaps >= _FLAPS:
        reason = f"the link went down and came back: {flaps} changes since the first look"
        return Verdict(check, "warn", reason, numbers, "change cable or optical module")
    if 0 < speed < speed_before:
        reason = f"the link runs at {speed:,} Mbit/s, and ran at {speed_before:,} before"
        return Verdict(check, "warn", reason, numbers, "look at cable, module and switch port")
    if any(new[kind] >= _LEAST and new[kind] > share * new["packets"] for kind, share in _SHARES.items()):
        how = f"{new['errors']:,} were wrong, {new['dropped']:,} dropped"
        reason = f"of {new['packets']:,} packets since the first look {how}"
        return Verdict(check, "warn", reason, numbers, f"ethtool -S {name} tells which; look at cable and ring buffers")
    at = f" at {speed:,} Mbit/s" if speed > 0 else ""
    return Verdict(check, "ok", f"up{at}, {new['errors']:,} wrong packets since the first look", numbers)


def _of(files: Files, name: str, key: str) -> int | None:
    return number(files, f"{_NET}/{name}/{key}")


def _both_ways(files: Files, name: str, kind: str) -> int:
    """Received and sent."""
    return sum(_of(files, name, f"statistics/{way}_{kind}") or 0 for way in ("rx", "tx"))


def judge_infiniband(look: Look) -> list[Verdict]:
    """Every port of every adapter."""
    ports = [(adapter, port) for adapter in names(look.now, _IB) for port in names(look.now, f"{_IB}/{adapter}/ports")]
    if not ports:
        return [Verdict("InfiniBand", "ok", "there is none")]
    return [_port(look, adapter, port) for adapter, port in ports]


def _port(look: Look, adapter: str, port: str) -> Verdict:
    check, folder = f"InfiniBand {adapter}:{port}", f"{_IB}/{adapter}/ports/{port}"
    state, physical = (word(look.now, f"{folder}/{key}") for key in ("state", "phys_state"))
    rate = look.now.get(f"{folder}/rate", "").strip()
    numbers = {key: float(more) for key, more in _new_errors(look, folder)}
    if state != "ACTIVE":
        was = word(look.first, f"{folder}/state") if look.first else ""
        reason = f"the port is {state or 'in no known state'} ({physical or 'physical state unknown'})"
        reason += ", and was ACTIVE before" if was == "ACTIVE" else ""
        is_unused = look.first is None and physical in ("Disabled", "Polling")  # no cable was ever there
        way_out = "look at cable and switch port; ibstat tells more"
        return Verdict(check, "warn" if is_unused else "bad", reason, numbers, way_out)
    was_rate = (look.first or {}).get(f"{folder}/rate", rate).strip()
    if gbit(rate) < gbit(was_rate):
        return Verdict(check, "warn", f"runs at {rate}, and ran at {was_rate} before", numbers, "look at the cable")
    many = [f"{key} {numbers[key]:,.0f}" for key, limit in _IB_COUNTERS.items() if numbers.get(key, 0.0) >= limit]
    if many:
        return Verdict(
            check, "warn", f"since the first look: {', '.join(many)}", numbers, "look at the cable; perfquery"
        )
    return Verdict(check, "ok", f"ACTIVE at {rate or 'an unknown rate'}", numbers)


def _new_errors(look: Look, folder: str) -> Iterator[tuple[str, int]]:
    for key in _IB_COUNTERS:
        path = f"{folder}/counters/{key}"
        now = number(look.now, path)
        if now is not None:
            yield key, now - (number(look.first or look.now, path) or 0)


def word(files: Files, path: str) -> str:
    """``ACTIVE`` of ``4: ACTIVE``."""
    return files.get(path, "").rpartition(":")[2].strip()


def gbit(rate: str) -> float:
    """Of ``400 Gb/sec (4X NDR)``."""
    words = rate.split()
    return float(words[0]) if words and words[0].replace(".", "", 1).isdigit() else 0.0


_COUNTED = tuple(f"statistics/[rt]x_{kind}" for kind in (*_SHARES, "packets"))
_KEYS = ("flags", "carrier", "carrier_changes", "speed", "device/uevent", *_COUNTED)
INTERFACES = FileCheck([f"{_NET}/*/{key}" for key in _KEYS], judge_interfaces)
INFINIBAND = FileCheck(
    [f"{_IB}/*/ports/*/{key}" for key in ("state", "phys_state", "rate", *(f"counters/{key}" for key in _IB_COUNTERS))],
    judge_infiniband,
)

"""What rate every stream gets where links are shared fairly, and what that makes of a collective.

Max-min fairness, by filling: all rates rise together until a link is full, its streams stay at that rate, the others go on
(Bertsekas and Gallager, Data Networks, section 6.5.2). Congestion control only comes near it.
"""

from collections.abc import Sequence

import numpy as np

from evermesh.parallelism.fabric.paths import DIRECT, Paths
from evermesh.parallelism.fabric.wiring import Floats, Ints, Wiring

_TINY = 1e-9


def fair_rates(paths: Paths, wiring: Wiring) -> Floats:
    """Bytes per second of every stream, while all of them send."""
    links, speeds = _links(paths, wiring)
    rates, left = np.zeros(len(paths)), speeds.astype(float)
    waiting = np.ones(len(paths), bool)
    while waiting.any():
        users = np.bincount(links[waiting].ravel(), minlength=len(speeds))[: len(speeds)]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(users > 0, left / users, np.inf)
        shares[0] = np.inf  # in the place of links that a path does not have
        least = shares.min()
        full = shares <= least * (1 + _TINY)
        stops = waiting & full[links].any(1)
        rates[stops] = least
        left -= np.bincount(links[stops].ravel(), minlength=len(speeds))[: len(speeds)] * least
        left = np.maximum(left, 0.0)
        waiting &= ~stops
    return rates


def _links(paths: Paths, wiring: Wiring) -> tuple[Ints, Floats]:
    """Numbers of the four links of every stream, 0 for one that it does not have; and the speed of every link."""
    ports, (leaves, spines) = len(wiring.port_leaf), wiring.trunk_bytes_per_s.shape
    at = paths.spine != DIRECT
    ends = [wiring.port_leaf[port] * spines + paths.spine for port in (paths.source_port, paths.target_port)]
    first = 1 + 2 * ports
    columns = [
        1 + paths.source_port,
        1 + ports + paths.target_port,
        np.where(at, first + ends[0], 0),
        np.where(at, first + leaves * spines + ends[1], 0),
    ]
    trunks = wiring.trunk_bytes_per_s.ravel()
    speeds = np.concatenate([[1.0], wiring.port_bytes_per_s, wiring.port_bytes_per_s, trunks, trunks])
    return np.stack(columns, axis=1), speeds


def ring_rates(paths: Paths, wiring: Wiring, jobs: Sequence[Ints], *, shifts: bool = False) -> list[float]:
    """Bytes per second that every connection of a job gets, where all of its connections move in step; by job.

    ``jobs`` has the numbers of the streams of each. Every stream of a connection carries an equal share, so the slowest of
    all decides; or, with ``shifts``, the sender gives more to those that are faster, so the slowest connection decides.
    """
    rates, found = fair_rates(paths, wiring), []
    for streams in jobs:
        of_connection, inverse = np.unique(paths.connection[streams], return_inverse=True)
        if shifts:
            found.append(float(np.bincount(inverse, rates[streams]).min()))
        else:
            number = np.bincount(inverse, minlength=len(of_connection))
            found.append(float((rates[streams] * number[inverse]).min()))
    return found


__all__ = ["fair_rates", "ring_rates"]

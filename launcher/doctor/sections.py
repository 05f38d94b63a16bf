"""The sections of ``evermesh doctor``, each a number of verdicts about this machine. Imports no torch."""

import time
from collections.abc import Iterator
from typing import NamedTuple

from evermesh.fault.hardware.gpus import find_gpus
from evermesh.fault.hardware.looking import look_at_hardware, with_gpus
from evermesh.fault.health.looking import Watch, clock
from evermesh.fault.health.probes.running import run_tests
from evermesh.fault.health.verdicts import Verdict, worst
from evermesh.launcher.doctor.recorder import check_recorder
from evermesh.launcher.hardware_tables import hardware_verdicts

_BETWEEN_LOOKS_S = 0.5


class Found(NamedTuple):
    """A verdict and where it belongs."""

    section: str
    verdict: Verdict


def check_machine(*, quick: bool = False, rebuild: bool = False) -> Iterator[Found]:
    """Look at this machine. ``quick``: host, GPUs and cards, a second; else it builds and measures, ten seconds and more."""
    watch = Watch()
    first = {verdict.check: verdict for verdict in watch.host()}
    time.sleep(_BETWEEN_LOOKS_S)  # what is stuck, or swaps, shows only in two looks
    for verdict in watch.host():
        before = first.get(verdict.check, verdict)
        yield Found("host", before if worst((before, verdict)) == before.state else verdict)
    yield Found("host", clock())
    yield from (Found("GPUs", verdict) for verdict in watch.gpus())
    hardware = with_gpus(look_at_hardware(), find_gpus())
    yield from (Found("hardware", verdict) for verdict in hardware_verdicts(hardware))
    if not quick:
        yield from (Found("recorder", verdict) for verdict in check_recorder(rebuild=rebuild))
        yield from (Found("tests", verdict) for verdict in run_tests())

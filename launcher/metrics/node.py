"""A machine in numbers, and what an agent knows of the ranks on it. Works without a job."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
from prometheus_client.metrics_core import Metric

from evermesh.fault.health.host.files import table
from evermesh.launcher.messages import RankBeat
from evermesh.launcher.metrics.families import counter, counters, gauge, gauges

_SHM = Path("/dev/shm")
_VMSTAT = Path("/proc/vmstat")


class NodeCollector:
    """What Prometheus is told of this machine. Any thread may ask.

    Args:
        folders: whose file systems are told, by path.
        more: families of whoever serves this; called at every request.
    """

    def __init__(self, folders: Sequence[Path] = (), more: Callable[[], Iterator[Metric]] | None = None) -> None:
        self._folders, self._more = (*folders, _SHM), more

    def collect(self) -> Iterator[Metric]:
        """All families, as they stand now."""
        memory = psutil.virtual_memory()
        yield from gauge("machine_processors", "Processors.", psutil.cpu_count())
        yield from gauge("machine_load1", "Processes that ran or waited, mean of one minute.", os.getloadavg()[0])
        yield from gauge("machine_memory_bytes", "Memory.", memory.total)
        yield from gauge("machine_memory_available_bytes", "Memory that is available.", memory.available)
        yield from gauge("machine_boot_timestamp_seconds", "When it was started, Unix time.", psutil.boot_time())
        yield from self._file_systems()
        yield from _network()
        yield from _processors()
        kills = out_of_memory_kills()
        if kills is not None:
            yield from counter("machine_oom_kills", "Processes that the kernel ended for want of memory.", kills)
        if self._more is not None:
            yield from self._more()

    def _file_systems(self) -> Iterator[Metric]:
        usages = {str(folder): shutil.disk_usage(folder) for folder in self._folders if folder.is_dir()}
        told = (((path,), float(usage.total)) for path, usage in usages.items())
        yield from gauges("machine_file_system_bytes", "Size of the file system of a folder.", ("folder",), told)
        free = (((path,), float(usage.free)) for path, usage in usages.items())
        yield from gauges("machine_file_system_free_bytes", "What is free of it.", ("folder",), free)


def _network() -> Iterator[Metric]:
    found = psutil.net_io_counters(pernic=True)
    for name, text, field in (
        ("received_bytes", "Bytes that an interface received.", "bytes_recv"),
        ("sent_bytes", "Bytes that it sent.", "bytes_sent"),
        ("receive_errors", "Packets that were damaged.", "errin"),
        ("receive_drops", "Packets that were dropped.", "dropin"),
    ):
        values = ((interface, float(getattr(counts, field))) for interface, counts in sorted(found.items()))
        yield from counters(f"machine_network_{name}", text, "interface", values)


def _processors() -> Iterator[Metric]:
    times = psutil.cpu_times()._asdict()
    wanted = ("user", "system", "idle", "iowait", "steal")
    values = ((mode, times[mode]) for mode in wanted if mode in times)
    yield from counters("machine_processor_seconds", "Time of all processors by what it was spent on.", "mode", values)


def out_of_memory_kills() -> int | None:
    """Since the machine was started; None where the kernel does not tell."""
    try:
        return table(_VMSTAT.read_text()).get("oom_kill")
    except OSError:
        return None


def rank_families(node: str, beats: Sequence[RankBeat]) -> Iterator[Metric]:
    """What an agent sees of its ranks from outside."""
    for name, text, field in (
        ("rank_step", "Steps that the rank has finished.", "step"),
        ("rank_step_seconds", "Wall time of its newest step.", "step_s"),
        ("rank_idle_seconds", "Since it was seen to do anything.", "idle_s"),
        ("rank_stopped_seconds", "Since it is stopped, as by SIGSTOP.", "stopped_s"),
    ):
        told = (((str(beat.rank), node), float(getattr(beat, field))) for beat in beats)
        yield from gauges(f"agent_{name}", text, ("rank", "node"), told)

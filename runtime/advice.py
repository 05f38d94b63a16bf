"""Says on rank 0 when another layout would be worth a switch; imports no torch."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.layout.device import DEVICES, Device
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.parallelism.layout.policy import SwitchingPolicy
from evermesh.parallelism.layout.switching import Advice, LayoutAdvisor, SearchedOptions
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.cost import ELEMENT_BYTES
from evermesh.runtime.layout import is_supported


class LayoutWatch:
    """Hands the lengths of batches to an advisor in a thread of its own, so that no step waits for a search."""

    def __init__(self, advisor: LayoutAdvisor) -> None:
        self._advisor = advisor
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layout-advice")
        self._observed: deque[Future[Advice | None]] = deque()

    def observe(self, lengths: Sequence[int]) -> Iterator[Advice]:
        """Take note of a batch; yields what is known of those before it by now."""
        self._observed.append(self._thread.submit(self._advisor.observe, tuple(lengths)))
        while self._observed and self._observed[0].done():
            yield from self._taken()

    def close(self) -> Iterator[Advice]:
        """Wait for what is under way, and end the thread; yields the rest."""
        self._thread.shutdown(wait=True)
        while self._observed:
            yield from self._taken()

    def _taken(self) -> Iterator[Advice]:
        advice = self._observed.popleft().result()
        if advice is not None:
            yield advice


def layout_watch(
    config: TrainConfig, policy: SwitchingPolicy, shape: ModelShape, nodes: Sequence[int], device_name: str
) -> LayoutWatch:
    """A watch over a run on as many ranks as ``nodes`` has, which is the node of each.

    Links and networks are those that devices of this kind usually have; ``device_name`` is what the driver calls it.
    """
    device, number = device_of(config, device_name), len(set(nodes))
    options = SearchOptions(
        device=device,
        element_bytes=ELEMENT_BYTES[config.dtype],
        supports=lambda layout: is_supported(layout, config.model, config.compile),
    )
    topology = device.topology(number, len(nodes) // number)
    return LayoutWatch(LayoutAdvisor(SearchedOptions(config.layout, shape, topology, options), policy))


def device_of(config: TrainConfig, name: str = "") -> Device:
    """The nominal rates of what a run computes with; ``name`` is what the driver calls it, an H100 stands for any other."""
    if config.device.kind == "cpu":
        nominal, threads = DEVICES["cpu"], config.device.threads
        rates = ("flops_per_s", "attention_flops_per_s", "peak_flops_per_s")
        return nominal.model_copy(update={rate: threads * getattr(nominal, rate) for rate in rates})
    known = (device for kind, device in DEVICES.items() if kind in name.lower())
    return next(known, DEVICES["h100"])


__all__ = ["LayoutWatch", "device_of", "layout_watch"]

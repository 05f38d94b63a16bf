"""Families of numbers as Prometheus reads them; what is not known is left out."""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

Value = float | None


def gauge(name: str, text: str, value: Value) -> Iterator[Metric]:
    """One number; nothing where it is not known."""
    if value is not None:
        yield GaugeMetricFamily(f"evermesh_{name}", text, value=value)


def gauges(
    name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], Value]]
) -> Iterator[Metric]:
    """The same number of many; those of which it is not known are left out."""
    family = GaugeMetricFamily(f"evermesh_{name}", text, labels=labels)
    for found, value in values:
        if value is not None:
            family.add_metric(found, float(value))
    if family.samples:
        yield family


def states(name: str, text: str, known: Iterable[str], current: str) -> Iterator[Metric]:
    """One number per state: 1 for the current one, 0 for the others."""
    return gauges(name, text, ("state",), (((state,), float(state == current)) for state in known))


def counter(name: str, text: str, value: float) -> Iterator[Metric]:
    """A number that only grows; Prometheus appends ``_total``."""
    yield CounterMetricFamily(f"evermesh_{name}", text, value=value)


def counters(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Iterator[Metric]:
    """Numbers that only grow, by ``label``."""
    family = CounterMetricFamily(f"evermesh_{name}", text, labels=(label,))
    for found, value in values:
        family.add_metric((found,), value)
    if family.samples:
        yield family

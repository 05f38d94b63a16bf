"""A run that asks for it is told when another layout would pay; it goes on as it is."""

from pathlib import Path

import pytest
import torch

from evermesh.fault.events import read_events
from evermesh.parallelism import Layout
from evermesh.parallelism.layout.policy import SwitchingPolicy
from evermesh.parallelism.layout.switching import Advice, LayoutAdvisor, Option
from evermesh.runtime import TrainConfig
from evermesh.runtime.advice import LayoutWatch, layout_watch
from tests.cluster import run_ranks
from tests.runtime.test_trainer import _fit, small_config

EAGER = {"window": 2, "patience": 1, "in_sight": 1_000_000, "least_gain": 0.01, "restart_s": 0.0}


def test_true_is_the_default_policy_and_false_is_none(corpus: Path) -> None:
    asked = [
        TrainConfig.model_validate(small_config(corpus, advise_layout=value)).advise_layout
        for value in (True, "true", False, None, EAGER)
    ]
    assert asked == [SwitchingPolicy(), SwitchingPolicy(), None, None, SwitchingPolicy.model_validate(EAGER)]


def test_advice_is_an_event_and_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    """Tensor parallel ranks over a slow link, where two HDP ranks would do."""
    values = small_config(corpus, steps=4, layout={"capacity": 600, "tp": 2})
    runs = {}
    for name, changes in (("plain", {}), ("advised", {"advise_layout": EAGER})):
        (tmp_path / name).mkdir()
        runs[name] = run_ranks(2, _fit, values | changes, tmp_path / name, False)
    for plain, advised in zip(*runs.values(), strict=True):
        assert all(torch.equal(plain[name], advised[name]) for name in plain)
    assert not [event for event in read_events(tmp_path / "plain" / "events.jsonl") if event.kind == "layout advice"]
    events = [event for event in read_events(tmp_path / "advised" / "events.jsonl") if event.kind == "layout advice"]
    assert len(events) == 1  # the second window says the same
    print(f"\n{events[0].text}")
    layout = Layout.model_validate(events[0].fields["layout"])
    assert layout.world_size == 2
    assert layout.tp == 1
    assert "instead of" in events[0].text


def test_a_watch_waits_for_what_is_under_way_and_raises_what_went_wrong() -> None:
    other = Layout(hdp=2, tp=2)

    def options(batches: object) -> tuple[Option, list[Option]]:
        return Option(Layout(hdp=4), 2.0, 0.0), [Option(other, 1.0, 0.0)]

    watch = LayoutWatch(LayoutAdvisor(options, SwitchingPolicy.model_validate(EAGER)))
    found: list[Advice] = [*watch.observe([5]), *watch.observe([5]), *watch.close()]
    assert [advice.layout for advice in found] == [other]

    def broken(batches: object) -> tuple[Option, list[Option]]:
        raise ZeroDivisionError

    watch = LayoutWatch(LayoutAdvisor(broken, SwitchingPolicy.model_validate(EAGER | {"window": 1})))
    with pytest.raises(ZeroDivisionError):
        [*watch.observe([5]), *watch.close()]


def test_the_watch_of_a_run_knows_its_nodes_and_threads(corpus: Path) -> None:
    config = TrainConfig.model_validate(small_config(corpus, layout={"hdp": 4, "capacity": 600}))
    shape = config.model.shape(400)
    watch = layout_watch(config, SwitchingPolicy(), shape, (0, 0, 1, 1), "")
    assert list(watch.close()) == []

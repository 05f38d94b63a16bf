"""Stripes of a job span racks as far as any order of its nodes could, and say where that is not far enough."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pytest

from evermesh.launcher.controller.in_memory import job_groups
from evermesh.launcher.controller.journal import read_journal
from evermesh.launcher.controller.racks import code_for_racks, lost_rack, place_nodes
from evermesh.launcher.controller.recovery import Group, groups_of
from tests.launcher.controller.worlds import world

Racks = Mapping[str, str]


def _names(number: int) -> tuple[str, ...]:
    return tuple(f"node-{at}" for at in range(number))


def _worst(nodes: Sequence[str], racks: Racks, groups: Sequence[Group]) -> int:
    """Members of a stripe that one rack holds, counted; where more are lost than tolerated this is what matters."""
    return max(max(Counter(racks.get(nodes[at], nodes[at]) for at in group.places).values()) for group in groups)


@pytest.mark.parametrize("code", ["1+1", "2+1", "1+2"])
@pytest.mark.parametrize("number", [4, 5])
def test_no_order_of_the_nodes_spreads_stripes_wider(code: str, number: int) -> None:
    names, groups = _names(number), groups_of(number, code)
    for labels in itertools.product("abc-", repeat=number):
        racks = {name: label for name, label in zip(names, labels, strict=True) if label != "-"}
        placed = place_nodes(names, (), names, racks, groups)
        assert sorted(placed) == sorted(names)
        best = min(_worst(order, racks, groups) for order in itertools.permutations(names))
        assert _worst(placed, racks, groups) == best, racks
        survives = best <= groups[0].tolerated or not racks
        assert (lost_rack(placed, racks, groups) is None) == survives, racks


def _partitions(number: int, most: int) -> Iterator[tuple[int, ...]]:
    """The ways to divide so many nodes into racks, the largest first."""
    if number == 0:
        yield ()
    for first in range(min(number, most), 0, -1):
        yield from ((first, *rest) for rest in _partitions(number - first, first))


@pytest.mark.parametrize("number", range(2, 9))
def test_auto_survives_the_loss_of_a_rack_wherever_a_code_with_no_more_parity_than_data_does(number: int) -> None:
    names, least = _names(number), groups_of(number, "auto")[0].tolerated
    for sizes in _partitions(number, number):
        racks = dict(zip(names, (str(rack) for rack, size in enumerate(sizes) for _ in range(size)), strict=True))

        def is_good(code: str, racks: Racks = racks) -> bool:
            groups = groups_of(number, code)
            enough = all(group.tolerated >= least and 2 * group.tolerated <= len(group.places) for group in groups)
            return enough and lost_rack(place_nodes(names, (), names, racks, groups), racks, groups) is None

        codes = [f"{data}+{parity}" for parity in range(1, number) for data in range(1, number - parity + 1)]
        chosen = code_for_racks(number, sizes)
        assert is_good(chosen) == any(map(is_good, codes)), (sizes, chosen)
        if chosen != "auto":
            least_more = min(_more(groups_of(number, code)) for code in codes if is_good(code))
            assert _more(groups_of(number, chosen)) == least_more


def _more(groups: Sequence[Group]) -> float:
    """Memory for parity, of that for data."""
    return max(group.tolerated / (len(group.places) - group.tolerated) for group in groups)


def test_a_job_that_says_its_racks_has_auto_protect_it_from_the_loss_of_one() -> None:
    racks = {"node-0": "a", "node-1": "b", "node-2": "b", "node-3": "a"}
    with world(workers=4, nodes=4, spares=0, racks=racks) as job:
        job.settle(2.0)
        assert job.controller.life is not None
        assert job.controller.job.lost_rack is None
        assert [group.code for group in job_groups(job.config, 4)] == ["1+1", "1+1"]
        assert [group.code for group in job_groups(job.config, 3)] == ["2+1"], "of three nodes two may be of one rack"


def test_without_racks_or_stripes_nodes_stay_in_the_order_in_which_they_came() -> None:
    chosen = ("node-2", "node-0", "node-1")
    assert place_nodes(chosen, (), chosen, {}, groups_of(3, "auto")) == chosen
    assert place_nodes(chosen, (), chosen, {"node-1": "a"}, groups_of(3, "none")) == chosen
    assert lost_rack(chosen, dict.fromkeys(chosen, "a"), groups_of(3, "none")) is None


def test_who_is_left_keeps_his_place_and_the_spare_whose_rack_is_rarest_in_the_stripe_takes_the_free_one() -> None:
    before, groups = _names(4), groups_of(4, "1+1")
    assert [group.places for group in groups] == [(0, 2), (1, 3)]
    for labels in itertools.product("ab", repeat=6):
        racks = dict(zip(_names(6), labels, strict=True))
        for lost in range(4):
            ready = [name for name in _names(6) if name != before[lost]]
            placed = place_nodes(tuple(ready[:4]), before, ready, racks, groups)
            kept = [name for at, name in enumerate(placed) if at != lost]
            assert kept == [name for at, name in enumerate(before) if at != lost]
            mate = racks[before[(lost + 2) % 4]]
            shared = {spare: racks[spare] == mate for spare in ("node-4", "node-5")}
            assert shared[placed[lost]] == min(shared.values())


def test_with_another_number_of_places_all_nodes_are_put_in_order_again() -> None:
    racks = {"node-0": "a", "node-1": "a", "node-2": "b", "node-3": "b"}
    left = ("node-0", "node-2", "node-3")
    back = place_nodes((*left, "node-1"), left, _names(4), racks, groups_of(4, "1+1"))
    assert back == ("node-0", "node-1", "node-2", "node-3")


def test_what_is_said_where_a_rack_cannot_be_lost() -> None:
    one_rack, groups = dict.fromkeys(_names(4), "a"), groups_of(4, "1+1")
    told = lost_rack(_names(4), one_rack, groups)
    assert told is not None
    assert told.startswith(
        "loss of one rack (of 1): at most 2 members of a stripe, 1 are tolerated: NOT survived. In any"
    )
    assert "Take more parity" in told
    racks = {"node-0": "a", "node-1": "b", "node-2": "a", "node-3": "b"}
    assert "when the run is resumed" in (lost_rack(_names(4), racks, groups) or "")


def test_a_job_puts_nodes_of_one_rack_into_different_stripes_and_says_when_a_spare_ends_that() -> None:
    racks = {"node-0": "a", "node-1": "b", "node-2": "b", "node-3": "a", "node-4": "b"}
    shape = {"workers": 4, "nodes": 4, "spares": 1, "racks": racks}
    with world(**shape, train={**_train(), "snapshot": {"code": "3+1"}}) as job:
        job.absent.add("node-4")
        job.settle(2.0)
        assert job.controller.life is not None
        assert job.controller.life.nodes == ("node-0", "node-3", "node-1", "node-2")
        assert job.controller.job.lost_rack is not None, "one stripe of four with one parity part"
        assert [entry.kind for entry in read_journal(job.run.journal)].count("rack unprotected") == 1
    data = {"train": {**_train(), "snapshot": {"code": "1+1"}}}
    with world(**shape, **data) as job:
        job.absent.add("node-4")
        job.settle(2.0)
        assert job.controller.job.lost_rack is None
        job.absent.clear()
        job.absent.add("node-3")
        job.settle(1.0)
        job.agents["node-3"].die()
        job.settle(3.0)
        assert job.controller.life is not None
        assert job.controller.life.nodes == ("node-0", "node-4", "node-1", "node-2")
        (told,) = [entry for entry in read_journal(job.run.journal) if entry.kind == "rack unprotected"]
        assert told.reason.startswith(
            "loss of one rack (of 2): at most 2 members of a stripe, 1 are tolerated: NOT survived"
        )
        assert "In any order" in told.reason, "three of four are of one rack now"


def _train() -> dict[str, object]:
    return {
        "model": {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32},
        "data": {"sources": [{"kind": "corpus", "path": "nowhere"}], "context": 256, "batch_tokens": 1024},
        "layout": {"capacity": 160},
    }

"""``evermesh snapshot plan``: the odds of the formula, refusals by number, and the same as JSON."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evermesh.fault.snapshot.coding import CodeImpossible
from evermesh.fault.snapshot.stripes import StripesImpossible
from evermesh.fault.snapshot.stripes.interval import Rates, best_interval
from evermesh.launcher.commands.app import app
from evermesh.parallelism.topology import Node, Topology


def _run(*arguments: str | Path) -> str:
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    found = CliRunner().invoke(app, ["snapshot", "plan", *map(str, arguments)], env=environment, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_the_table_has_stripes_and_copies_beside_each_other() -> None:
    lines = _run("--nodes", "16", "--per-rack", "2", "--code", "6+2", "--state-gb", "90").splitlines()
    assert lines[0] == "16 nodes in stripes: 2 x 6+2; memory for parity +33%"
    assert lines[1] == "all state is coded; what data-parallel nodes of a stripe hold alike would not be: see --copies"
    assert lines[2] == "memory of a node: 240.0 GB (two snapshots of 90.0 GB and their parity)"
    assert "loss of one rack (of 8): at most 1 members of a stripe, 2 are tolerated: survived" in lines[3]
    rows = {line[:28].strip(): line[28:].split() for line in lines[5:]}
    assert rows["stripes 6+2"] == ["+33%", "1", "1", "0.8000", "0.4308"]
    assert rows["2 copies"] == ["+100%", "1", "0.9333", "0.8000", "0.6154"]


@pytest.mark.parametrize(
    ("copies", "copied", "coded"),
    [(16, 1, 0), (8, 0.75, 0.25), (6, 0.5, 0.5), (4, 0.5, 0.75), (2, 1, 1), (16, 0, 1)],
    ids=lambda value: str(value),
)
def test_what_more_nodes_of_a_stripe_hold_than_may_be_lost_takes_no_parity(
    copies: int, copied: float, coded: float
) -> None:
    """16 nodes in two stripes of 6+2: of 8 copies each has 4, of 6 it has 3, of 4 it has 2, which code it once."""
    arguments = ("--nodes", "16", "--code", "6+2", "--copies", str(copies), "--copied", str(copied), "--json")
    found, without = json.loads(_run(*arguments)), json.loads(_run(*arguments[:4], "--json"))
    assert found["coded"] == coded
    assert found["memory"] == pytest.approx(coded / 3)
    assert [odds for _, _, odds in found["schemes"]] == [odds for _, _, odds in without["schemes"]]
    text = _run(*arguments[:-1], "--state-gb", "90").splitlines()
    assert text[0].endswith(f"memory for parity +{coded / 3:.0%}")
    assert (
        text[1] == f"{coded:.0%} of the state of a node is coded, once; of the rest its stripe has copies enough"
    ) == (coded < 1)
    assert text[2].startswith(f"memory of a node: {180 * (1 + coded / 3):,.1f} GB")


def test_json_has_the_figures_and_the_best_interval(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.json"
    nodes = tuple(Node(name=f"n{at}", devices=8, rack=f"r{at % 4}") for at in range(8))
    cluster.write_text(Topology(nodes=nodes).model_dump_json())
    arguments = ("--step-s", "4", "--stall-s", "0.5", "--failures", "10", "--restart-s", "30")
    found = json.loads(_run("--topology", cluster, "--must-survive", "rack", *arguments, "--json"))
    assert found["stripes"] == {"6+2": 1}
    assert found["domains"] == {"rack": [1.0, 0.0, 0.0, 0.0]}
    assert [name for name, _, _ in found["schemes"]] == ["stripes 6+2", "copies in +33%", "2 copies", "3 copies"]
    best = best_interval(Rates(4, 0.5, 0, 30, 1000 * 86400 / 80))
    assert found["interval"]["best"]["steps"] == best.steps > 1
    text = _run("--topology", cluster, *arguments)
    assert f"best: a snapshot every {best.steps} steps" in text


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("--nodes", "16", "--per-rack", "8", "--must-survive", "rack"), StripesImpossible, "2 racks are too few"),
        (("--nodes", "1"), StripesImpossible, "at least 2"),
        (("--nodes", "8", "--must-survive", "room"), StripesImpossible, "There are rack, switch, rail"),
        (("--nodes", "8", "--code", "6-2"), CodeImpossible, "such as 6\\+2"),
        (("--topology", Path(__file__)), StripesImpossible, "is no topology"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str | Path, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        _run(*arguments)

"""What several jobs know of nodes: nothing is lost, what is damaged is skipped, what is old is dropped, cordons stay."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.checkpoint.stores.places import ObjectPath, place_of
from evermesh.fault.cluster.identity import NodeIdentity, covers, full_name, host_name, identity_of
from evermesh.fault.cluster.records import LONGEST_TEXT, Cordon, Evidence, Record, Uncordon, shortened
from evermesh.fault.cluster.standing import cordon_of, evidence_against, known_nodes, standing_cordons
from evermesh.fault.cluster.store import KEEP_S, ClusterStore, cluster_place
from evermesh.fault.errors import ClusterUnusable

DAY_S = 86400.0
NOW_S = time.time()


def evidence(name: str = "a/node-0", time_s: float = NOW_S, **fields: str) -> Evidence:
    return Evidence(time_s=time_s, node=NodeIdentity(name=name, **fields), kind="process died", job="job")


def cordon(node: str, time_s: float, until_s: float | None = None, machine: str = "") -> Cordon:
    return Cordon(time_s=time_s, node=node, by="me", because="fan", until_s=until_s, machine=machine)


def uncordon(node: str, time_s: float) -> Uncordon:
    return Uncordon(time_s=time_s, node=node, by="me")


_WRITER = """
import sys
from pathlib import Path
from evermesh.fault.cluster.identity import NodeIdentity
from evermesh.fault.cluster.records import Evidence
from evermesh.fault.cluster.store import ClusterStore
store = ClusterStore(Path(sys.argv[1]))
sys.stdin.readline()
for number in range(200):
    store.add([Evidence(time_s=float(number), node=NodeIdentity(name=f"h/{sys.argv[2]}"), kind="k", text=f"{number}")])
    if number % 20 == 0:
        store.read()
"""


def test_nothing_is_lost_when_processes_write_and_read_at_the_same_time(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), name], stdin=subprocess.PIPE) for name in "ab"
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"go\n")
        writer.stdin.close()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = ClusterStore(tmp_path).read()
    assert found.problems == ()
    told = {(one.node.name, one.text) for one in found.records if isinstance(one, Evidence)}
    assert told == {(f"h/{name}", str(number)) for name in "ab" for number in range(200)}


def test_lines_that_are_no_records_are_told_and_skipped_and_one_without_an_end_waits(tmp_path: Path) -> None:
    store = ClusterStore(tmp_path)
    good = evidence()
    store.add([good])
    (file,) = tmp_path.rglob("*.jsonl")
    fields = json.loads(good.model_dump_json())
    with file.open("ab") as lines:
        lines.write(b"\xff\x00 torn\n" + json.dumps(fields | {"confidence": 7}).encode() + b'\n\n{"record": "ev')
    found = store.read()
    assert found.records == (good,)
    assert len(found.problems) == 2
    assert all(
        f"{file.name}, line {line}, is no record" in text for line, text in zip((2, 3), found.problems, strict=True)
    )
    assert "confidence" in found.problems[1]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_make_reading_fail(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    folder = tmp_path_factory.mktemp("store")
    (folder / "2026-01-01").mkdir()
    kept = evidence()
    (folder / "2026-01-01/w.jsonl").write_bytes(noise + b"\n" + kept.model_dump_json().encode() + b"\n")
    assert kept in ClusterStore(folder).read().records


def _write(folder: Path, age_days: float, *records: Record, writer: str = "w") -> None:
    day = time.strftime("%Y-%m-%d", time.gmtime(NOW_S - age_days * DAY_S))
    (folder / day).mkdir(exist_ok=True)
    with (folder / day / f"{writer}.jsonl").open("a") as file:
        file.writelines(record.model_dump_json() + "\n" for record in records)


def test_days_that_are_over_become_one_file_without_what_is_too_old(tmp_path: Path) -> None:
    old: list[Record] = [
        evidence(time_s=NOW_S - 40 * DAY_S),
        cordon("a", NOW_S - 40 * DAY_S),
        cordon("b", NOW_S - 40 * DAY_S),
    ]
    recent = [evidence(time_s=NOW_S - 5 * DAY_S, name=f"a/node-{number}") for number in range(4)]
    _write(tmp_path, 40, *old)
    _write(tmp_path, 33, uncordon("b", NOW_S - 33 * DAY_S))
    for number, record in enumerate(recent):
        _write(tmp_path, 5, record, writer=f"w{number}")
    new = evidence()
    _write(tmp_path, 0, new)
    store = ClusterStore(tmp_path)
    before = standing_cordons(store.read().records, NOW_S)
    store.tidy(NOW_S)
    found = ClusterStore(tmp_path).read()
    assert set(found.records) == {old[1], *recent, new}, "evidence is forgotten, a cordon that stands is not"
    assert standing_cordons(found.records, NOW_S) == before == [old[1]]
    assert len(list(tmp_path.rglob("*.jsonl"))) == 3
    names = sorted(path.name for path in tmp_path.rglob("*"))
    store.tidy(NOW_S)
    assert sorted(path.name for path in tmp_path.rglob("*")) == names, "nothing is left to do"


def test_whoever_is_killed_while_he_merges_leaves_all_records_and_each_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [evidence(time_s=NOW_S - 4 * DAY_S + number) for number in range(6)]
    for number, record in enumerate(records):
        _write(tmp_path, 4, record, writer=f"w{number}")
    for after in range(8):
        store, steps = ClusterStore(tmp_path), [0]

        def step(real: object, steps: list[int] = steps, after: int = after) -> object:
            def do(*given: object) -> object:
                steps[0] += 1
                if steps[0] > after:
                    raise KeyboardInterrupt
                return real(*given)  # type: ignore[operator]

            return do

        for name in ("write", "remove"):
            monkeypatch.setattr(store._shelf, name, step(getattr(store._shelf, name)))
        with contextlib.suppress(KeyboardInterrupt):
            store.tidy(NOW_S)
        assert list(ClusterStore(tmp_path).read().records) == records


def test_a_file_that_is_merged_while_it_is_read_is_looked_for_again(tmp_path: Path) -> None:
    for number in range(3):
        _write(tmp_path, 4, evidence(time_s=NOW_S - 4 * DAY_S + number), writer=f"w{number}")
    reader = ClusterStore(tmp_path)
    sizes, merged = reader._shelf.sizes, list[bool]()

    def sizes_before_the_merge() -> dict[str, int]:
        found = sizes()
        if not merged:
            merged.append(True)
            ClusterStore(tmp_path).tidy(NOW_S)
        return found

    reader._shelf.sizes = sizes_before_the_merge  # type: ignore[method-assign]
    assert len(reader.read().records) == 3


def test_a_place_that_cannot_be_used_says_so_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterUnusable, match="EVERMESH_CLUSTER"):
        ClusterStore(tmp_path / "file/below").add([evidence()])
    assert ClusterStore(tmp_path / "nowhere").read().records == ()


def test_the_place_is_what_is_given_then_the_variable_then_a_folder_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERMESH_CLUSTER", "s3://bucket/cluster")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert cluster_place(str(tmp_path / "own")) == tmp_path / "own"
    assert cluster_place() == ObjectPath("s3://bucket/cluster")
    monkeypatch.delenv("EVERMESH_CLUSTER")
    assert cluster_place() == tmp_path / "evermesh/cluster"
    assert place_of(str(cluster_place())) == cluster_place()


def test_a_re_used_name_is_not_blamed() -> None:
    was = evidence(machine="m1", boot="b1")
    for now, counts in [
        (NodeIdentity(name="a/node-0", machine="m1", boot="b2"), True),
        (NodeIdentity(name="a/node-0", machine="m2", boot="b1"), False),
        (NodeIdentity(name="a/node-0", boot="b1"), True),
        (NodeIdentity(name="a/node-0", boot="b2"), False),
        (NodeIdentity(name="a/node-0"), False),
        (NodeIdentity(name="b/node-0", machine="m1", boot="b1"), False),
    ]:
        assert bool(evidence_against(now, [was])) is counts, now
    assert evidence_against(NodeIdentity(name="a/node-0"), [evidence()]), "where nobody knows more the name has to do"
    own = identity_of("node-3", "127.0.0.1")
    assert (own.name, own) == (f"{host_name()}/node-3", identity_of("node-3", "127.0.0.1"))
    assert own.machine or own.boot
    assert identity_of("node-3", "10.0.0.7").name == f"{host_name()}/10.0.0.7"


def test_cordons_are_of_a_node_a_host_or_an_address_and_the_last_word_counts() -> None:
    node = NodeIdentity(name="gpu1/10.0.0.7", machine="m")
    assert full_name("node-1") == f"{host_name()}/node-1"
    for pattern, counts in [
        ("gpu1/10.0.0.7", True),
        ("gpu1", True),
        ("10.0.0.7", True),
        ("gpu", False),
        ("10.0.0", False),
    ]:
        assert covers(pattern, node.name) is counts
        assert (cordon_of(node, [cordon(pattern, 1.0)]) is not None) is counts
    assert not covers("node-1", "gpu1/node-1"), "every host has one"
    assert cordon_of(node, [cordon("gpu1", 1.0, machine="other")]) is None
    said: list[Record] = [
        cordon("gpu1", 1.0),
        uncordon("gpu1", 2.0),
        cordon("gpu1", 3.0, until_s=10.0),
        cordon("gpu1/node-2", 4.0),
    ]
    assert [standing_cordons(said[:end], 5.0) for end in (1, 2)] == [[said[0]], []]
    assert standing_cordons(said, 5.0) == [said[2], said[3]]
    assert standing_cordons(said, 10.0) == [said[3]], "its time is over"
    assert standing_cordons([*said, uncordon("gpu1", 6.0)], 7.0) == [], "all of the host"
    assert standing_cordons([*said, uncordon("gpu1/node-2", 6.0)], 7.0) == [said[2]]


def test_what_spoke_against_a_node_is_forgiven_when_it_is_uncordoned() -> None:
    before, after = evidence(time_s=1.0), evidence(time_s=3.0)
    assert evidence_against(before.node, [before, uncordon("a", 2.0), after]) == (after,)
    nodes = known_nodes([before, cordon("a", 1.5), cordon("b", 1.5)], 2.0)
    assert [(node.node.name, len(node.evidence), node.cordon is not None) for node in nodes] == [
        ("a/node-0", 1, True),
        ("b", 0, True),
    ]


def test_records_are_bounded() -> None:
    assert len(shortened("x" * 10_000 + "\nsecond")) == LONGEST_TEXT
    assert shortened(" one\ntwo") == "one"
    assert KEEP_S > 0

"""Short tests on this machine, each also with something wrong that it has to find."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evermesh.fault.health.probes import collective, matrix
from evermesh.fault.health.probes.disk import judge, probe_disk
from evermesh.fault.health.probes.link import LinkServer, measure, probe_loopback
from evermesh.fault.health.probes.memory import first_wrong, probe_memory
from evermesh.fault.health.probes.running import run_tests
from evermesh.fault.snapshot.handshake import new_nonce


def test_the_known_product_is_that_of_whole_numbers() -> None:
    a, b = matrix.factors()
    product = a @ b  # 64-bit whole numbers: no rounding, no library of linear algebra
    assert matrix.digest(product) == matrix.DIGEST
    assert abs(product).max() * matrix._TILES < 2**24
    wrong = product.copy()
    wrong[3, 4] += 1
    assert matrix.digest(wrong) != matrix.DIGEST


def test_the_processor_multiplies_exactly_and_a_wrong_entry_is_found() -> None:
    [found] = matrix.probe_matrices(0.05)
    assert (found.check, found.state) == ("arithmetic on cpu", "ok")
    assert found.numbers["flops_per_s"] > 0
    a, b = matrix.factors()
    known = torch.from_numpy(a @ b).double()
    known[7, 9] += 1
    timing = matrix.measure(torch.device("cpu"), a, b, known, 0.0)
    assert timing.wrong == 1
    assert timing.where.startswith("row 7, column 9")
    assert [verdict.state for verdict in matrix.judge([timing])] == ["bad"]


def test_a_processor_that_gets_the_known_product_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "DIGEST", "0" * 64)
    [found] = matrix.probe_matrices(0.0)
    assert found.state == "bad"


def test_the_slow_one_of_several_gpus_is_found() -> None:
    timings = [matrix.Timing(f"cuda:{index}", 6e14 if index != 2 else 4e14, 0, "") for index in range(4)]
    timings.append(matrix.Timing("cpu", 1e11, 0, ""))
    found = {verdict.check: verdict.state for verdict in matrix.judge(timings)}
    assert [check for check, state in found.items() if state != "ok"] == ["arithmetic on cuda:2"]


def test_memory_holds_patterns_and_a_flipped_bit_is_found() -> None:
    assert probe_memory(1 << 20, 0.0).state == "ok"
    words = np.full(1000, 0x5555555555555555, dtype=np.uint64)
    words[321] ^= np.uint64(1 << 17)
    found = first_wrong(words, np.asarray(0x5555555555555555, dtype=np.uint64))
    assert found is not None
    assert found.state == "bad"
    assert "at byte 2,568 in 1 bits" in found.reason


def test_a_disk_gives_back_what_was_written_and_leaves_nothing(tmp_path: Path) -> None:
    found = probe_disk(tmp_path, 4 << 20)
    assert found.state in ("ok", "warn"), found  # it may be slow, where others write too
    assert found.numbers["bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    assert judge("x", False, dict(found.numbers)).state == "bad"
    assert probe_disk(tmp_path / "gone").state == "warn"


def test_a_loopback_connection_is_measured_and_strangers_are_sent_away() -> None:
    found = probe_loopback(0.05)
    assert found.state == "ok"
    assert found.numbers["bytes_per_s"] > 1e6
    assert 0 < found.numbers["latency_s"] < 1
    secret = new_nonce()
    with LinkServer("127.0.0.1", secret) as server:
        assert measure(server.address, new_nonce(), 0.01).failed
        assert not measure(server.address, secret, 0.01).failed  # it still serves those who know the secret
        address = server.address
    assert "refused" in measure(address, secret, 0.01).failed


def test_a_rank_that_ends_or_says_nothing_or_sums_wrong_is_named() -> None:
    fine = {"sum_s": 0.01, "bytes": 1 << 20}
    assert "rank 1 of 2: all-reduce" in collective.judge([fine, {"failed": "all-reduce: 3 of 8 sums"}], 5.0).reason
    assert "no answer from rank 1" in collective.judge([fine, {}], 5.0).reason
    base = torch.arange(8.0)
    total, gathered = 2 * base + 1, [base, base + 1]
    assert collective._compare(base, 2, total, gathered) == ""
    assert "1 of 8 sums" in collective._compare(base, 2, total + torch.eye(8)[3], gathered)
    assert "from rank 1" in collective._compare(base, 2, total, [base, base])


def _one_dies(rank: int, ranks: int, meeting: str, budget_s: float) -> dict[str, Any]:
    if rank == 1:
        os._exit(3)
    return {"sum_s": 0.01, "bytes": 1}


def _one_is_silent(rank: int, ranks: int, meeting: str, budget_s: float) -> dict[str, Any]:
    time.sleep(600 * rank)
    raise OSError("no route to host")


def test_real_ranks_that_die_raise_or_hang_are_told_and_gone() -> None:
    assert collective.probe_collectives(2, 60.0, _one_dies).reason == "rank 1 of 2: ended without a word"
    told = collective.probe_collectives(2, 3.0, _one_is_silent)
    assert told.state == "bad"
    assert told.reason.startswith(("rank 0 of 2: OSError: no route to host", "no answer from rank"))
    assert multiprocessing.active_children() == []


def test_tests_that_take_too_long_are_ended_and_that_is_bad(tmp_path: Path) -> None:
    [found] = [verdict for verdict in run_tests(tmp_path, timeout_s=0.01) if verdict.check == "tests"]
    assert found.state == "bad"
    assert os.listdir(tmp_path) == []

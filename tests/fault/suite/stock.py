"""``python -m tests.fault.suite.stock``: what torch itself says of faults, by default and in its debug mode DETAIL.

Jobs of four ranks without the recorder, with a short timeout. A rank is named by a message of another one that says who did
not come, or by messages of others that each tell of two ranks that differ, and have one in common.
"""

import argparse
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

from tests.fault.recorder.recording import rings
from tests.fault.suite.faults import Fault
from tests.fault.suite.programs import Job
from tests.fault.suite.ranks import RankSpec, run_rank
from tests.fault.suite.running import CONTEXT, injected_ns

KINDS = ("SIGKILL", "SIGSTOP", "GIL held in C", "other shape", "other operation", "skipped")
_JOB, _RANK, _STEP = Job(dp=4, tp=1, pp=1), 2, 8
_TIMEOUT_S, _PATIENCE_S, _START_S = 4.0, 8.0, 90.0
_ABSENT = re.compile(r"Ranks? (\d+(?:, ?\d+)*) failed to pass")
_DIFFERING = re.compile(r"Rank (\d+) is running collective.*?but Rank (\d+) is running")


def main() -> None:
    """Run all kinds both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/faults-stock.json"))
    out = parser.parse_args().out
    rows = [row for kind in KINDS for row in (_measure(kind, is_detail=False), _measure(kind, is_detail=True))]
    for mode in ("stock", "DETAIL"):
        named = [row for row in rows if row["mode"] == mode and row["named"]]
        print(f"{mode} names {len(named)} of {len(KINDS)} kinds")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))


def _measure(kind: str, *, is_detail: bool) -> dict[str, object]:
    fault = Fault(kind, _RANK, _STEP, 0.4)
    with rings() as folder:
        specs = [
            RankSpec(_JOB, rank, folder, fault, timeout_s=_TIMEOUT_S, is_recorded=False, is_detail=is_detail)
            for rank in range(_JOB.world_size)
        ]
        processes = [CONTEXT.Process(target=run_rank, args=(spec,), daemon=True) for spec in specs]
        try:
            for process in processes:
                process.start()
            _wait(lambda: injected_ns(folder) is not None, _START_S)
            begun_ns = injected_ns(folder) or time.monotonic_ns()
            others = [process for rank, process in enumerate(processes) if rank != _RANK]
            _wait(lambda: any(process.exitcode is not None for process in others), _PATIENCE_S)
            seconds = (time.monotonic_ns() - begun_ns) / 1e9
            has_ended = any(process.exitcode is not None for process in others)
            _wait(lambda: all(process.exitcode is not None for process in others), 1.0)
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = {rank: (folder / f"{rank}.log").read_text(errors="replace") for rank in range(_JOB.world_size)}
    named = _named(said)
    row: dict[str, object] = {
        "kind": kind,
        "mode": "DETAIL" if is_detail else "stock",
        "ended_s": round(seconds, 2) if has_ended else None,
        "named": named == {_RANK},
        "ranks": sorted(named),
        "said": {rank: text[:600] for rank, text in said.items() if text},
    }
    when = f"{seconds:.2f} s" if has_ended else "never"
    print(f"{kind:16} {row['mode']:7} ends: {when:8} names {row['ranks'] or 'nobody'}", flush=True)
    return row


def _named(said: Mapping[int, str]) -> set[int]:
    """Ranks that messages of others than the faulty one name."""
    text = "\n".join(of for rank, of in said.items() if rank != _RANK)
    absent = {int(number) for found in _ABSENT.findall(text) for number in found.split(",")}
    pairs = [{int(one), int(other)} for one, other in _DIFFERING.findall(text)]
    return absent or (set.intersection(*pairs) if pairs else set())


def _wait(holds: object, most_s: float) -> None:
    assert callable(holds)
    until = time.monotonic() + most_s
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)


if __name__ == "__main__":
    main()

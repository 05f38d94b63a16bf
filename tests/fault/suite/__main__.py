"""``python -m tests.fault.suite``: faults of every kind, and innocents, in real jobs of gloo processes, watched from outside.

--kinds A,B   only these        --sizes 2,4,8   numbers of ranks        --seeds N   of every kind and size
--out FILE    what was found of every job, as JSON
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evermesh.fault.recorder.native.building import build_tap
from tests.fault.suite.cases import FAULTS, INNOCENTS, SIZES, TOO_FEW, draw
from tests.fault.suite.running import NotStarted, Outcome, run, warm_up
from tests.fault.suite.scoring import as_dict, score, table

_HEALTHY_TIMES = 3
"""Healthy jobs are run so many times as often."""


def main() -> None:
    """Run cases, one after another, and print what was found of them."""
    arguments = _arguments()
    kinds = arguments.kinds.split(",") if arguments.kinds else [*FAULTS, *INNOCENTS]
    tap = build_tap()
    print(f"tap: {tap.refused or 'native'}", flush=True)
    warm_up()
    started, outcomes = time.monotonic(), list[Outcome]()
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for size in map(int, arguments.sizes.split(",")):
            for kind in (kind for kind in kinds if TOO_FEW.get(kind, 0) < size):
                times = _HEALTHY_TIMES if kind == "healthy" else 1
                for again in range(times):
                    _add(outcomes, kind, size, seed * times + again)
                    _write(arguments.out, outcomes, started)
    print(f"\n{table(outcomes)}\n\n{json.dumps(_results(outcomes, started), indent=1)}")


def _results(outcomes: Sequence[Outcome], started: float) -> dict[str, Any]:
    return {**score(outcomes), "minutes": round((time.monotonic() - started) / 60, 1)}


def _write(path: Path, outcomes: Sequence[Outcome], started: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = [as_dict(one) for one in outcomes]
    path.write_text(json.dumps({**_results(outcomes, started), "cases": cases}, indent=1))


def _add(outcomes: list[Outcome], kind: str, size: int, seed: int) -> None:
    case = draw(kind, size, seed)
    try:
        outcome = run(case)
    except NotStarted as error:
        print(f"?? {case.name}: {error}", flush=True)
        return
    outcomes.append(outcome)
    mark = "ok" if outcome.is_found and not outcome.wrong else "--"
    job, fault = case.job, case.fault
    waited = f"{outcome.waited_s:.2f} s by {outcome.by}" if outcome.waited_s is not None else ""
    what = f"dp{job.dp} tp{job.tp} pp{job.pp} {job.flavour}{' plain' * job.is_plain}"
    print(f"{mark} {case.name} ({what}, rank {fault.rank if fault else None}) {waited}", flush=True)
    if mark != "ok":
        for name, findings in (("watched", outcome.seen), ("diagnosed", outcome.after)):
            for one in findings:
                print(f"     {name}: {one.kind}, rank {one.rank}, link {one.link}: {one.text}")
        print(f"     {'early; ' * outcome.is_early}{outcome.logs}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/faults.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""``python -m evermesh.fault.health SPEC``: a process that looks at its node until its input is closed.

It is a process of its own because what it asks may never answer: a driver, or a disk. SPEC is JSON: ``places`` (folder by
what it is for), ``every_s`` (null: only once), ``is_full`` (the short tests first). Each line of output is JSON:
``{"at": what is looked at next}``, ``{"gpus": [...]}`` once, or ``{"verdicts": [...]}``, these at first and whenever a state
has changed.
"""

import json
import select
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evermesh.fault.hardware.gpus import find_gpus
from evermesh.fault.health.looking import Watch
from evermesh.fault.health.verdicts import Verdict, changed


def main() -> None:
    """Look, tell, wait, until nobody listens."""
    spec = json.loads(sys.argv[1])
    watch = Watch({what: Path(folder) for what, folder in spec["places"].items()}, tell=lambda what: _say(at=what))
    tested = _test(spec) if spec["is_full"] else []
    told: dict[str, Verdict] | None = None
    try:
        while True:
            now = [*watch.look(), *tested]
            if told is None:
                _say(gpus=[asdict(gpu) for gpu in find_gpus()])
            if told is None or changed(told, now):
                _say(verdicts=[verdict.to_dict() for verdict in now])
            told = {verdict.check: verdict for verdict in now}
            if spec["every_s"] is None or select.select([sys.stdin], [], [], spec["every_s"])[0]:
                return
    except BrokenPipeError:  # nobody listens any more
        sys.stderr.close()


def _test(spec: dict[str, Any]) -> list[Verdict]:
    from evermesh.fault.health.probes.running import run_tests

    _say(at="the short tests")
    return run_tests()


def _say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

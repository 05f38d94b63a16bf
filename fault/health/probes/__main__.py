"""``python -m evermesh.fault.health.probes FOLDER``: one verdict per line, as JSON, as soon as it is known."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from evermesh.fault.health.verdicts import Verdict


def main() -> None:
    """Run all tests, one after the other: together they would measure each other."""
    for verdict in _verdicts(Path(sys.argv[1])):
        print(json.dumps(verdict.to_dict()), flush=True)


def _verdicts(folder: Path) -> Iterator[Verdict]:
    import torch  # noqa: F401  before the ranks are forked, which are to have it

    from evermesh.fault.health.probes.collective import probe_collectives
    from evermesh.fault.health.probes.disk import probe_disk
    from evermesh.fault.health.probes.link import probe_loopback
    from evermesh.fault.health.probes.matrix import probe_matrices
    from evermesh.fault.health.probes.memory import probe_memory

    yield probe_collectives()  # first: no other thread is there yet
    yield probe_memory()
    yield probe_disk(folder)
    yield probe_loopback()
    yield from probe_matrices()


if __name__ == "__main__":
    main()

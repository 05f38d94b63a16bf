"""``python -m tests.benchmarks [ROOM[/NAME]]``: run all benchmarks, those of a room, or one."""

import importlib
import sys
import time
from pathlib import Path

from tests.benchmarks.harness import publish

_HERE = Path(__file__).parent


def main(wanted: str) -> int:
    """Run every ``bench_NAME.py`` whose path below this folder starts with ``wanted``."""
    files = sorted(file for file in _HERE.glob("*/bench_*.py") if _title(file).startswith(wanted))
    if not files:
        known = ", ".join(sorted({_title(file) for file in _HERE.glob("*/bench_*.py")}))
        print(f"no benchmark matches {wanted!r}; there are: {known}", file=sys.stderr)
        return 2
    for file in files:
        module = importlib.import_module(f"tests.benchmarks.{file.parent.name}.{file.stem}")
        started = time.monotonic()
        rows = module.run()
        publish(_title(file).replace("/", "-"), rows, time.monotonic() - started)
    return 0


def _title(file: Path) -> str:
    return f"{file.parent.name}/{file.stem.removeprefix('bench_')}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))

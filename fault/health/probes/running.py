"""All short tests of one node, in a process of their own: it loads torch, and opens GPUs."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from evermesh.fault.health.verdicts import Verdict

_MODULE = "evermesh.fault.health.probes"
_BUDGET_S = 90.0


def run_tests(folder: Path | None = None, timeout_s: float = _BUDGET_S) -> list[Verdict]:
    """Run them, with ``folder`` as the disk that is tested; takes some ten seconds. Loads no torch here."""
    command = [sys.executable, "-m", _MODULE, str(folder or tempfile.gettempdir())]
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # of NumPy: ranks are forked from that process
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=one_thread,
        )
    except subprocess.TimeoutExpired:
        reason = f"did not come to an end in {timeout_s:.0f} s"
        return [Verdict("tests", "bad", reason, {"timeout_s": timeout_s}, "see what else runs here (top), and dmesg")]
    found = [Verdict(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        fact = f"ended with {done.returncode} after {len(found)} verdicts: {last}"
        found.append(Verdict("tests", "bad", fact, {}, f"run it by hand: {' '.join(command)}"))
    return found

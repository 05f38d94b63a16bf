"""``python -m tests.benchmarks.launcher.patient_watcher SLOWER``: a real watcher, of agents that talk more rarely."""

import sys
from unittest import mock

from evermesh.launcher.controller.watching import windows
from evermesh.launcher.controller.watching.__main__ import main

if __name__ == "__main__":
    with mock.patch.object(windows, "_LATE_S", windows._LATE_S * float(sys.argv[1])):
        main()

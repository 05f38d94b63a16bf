"""``python -m evermesh.launcher.tracking RUN NUMBER``: the process of one tracker of a job, NUMBER in its file.

It lives until the run has ended and all is told, whatever becomes of the controller that started it.
"""

import sys
from pathlib import Path

from evermesh.launcher.errors import RunTracked
from evermesh.launcher.run_directory import Run
from evermesh.launcher.tracking.process import track_run


def main() -> None:
    """Follow the run; a second process of the same tracker ends at once."""
    run = Run(Path(sys.argv[1]))
    try:
        sys.exit(track_run(run, run.config().trackers[int(sys.argv[2])]))
    except RunTracked:
        return  # the one that a controller before has started


if __name__ == "__main__":
    main()

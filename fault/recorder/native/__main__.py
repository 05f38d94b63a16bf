"""``python -m evermesh.fault.recorder.native``: build the native tap, unless it is there, and tell what came of it."""

import os
import sys

from evermesh.fault.recorder.errors import TapUnusable
from evermesh.fault.recorder.native.building import build_tap


def main() -> int:
    """Returns 0 whether or not it could be built: Python records instead."""
    if "--gently" in sys.argv[1:]:
        os.nice(19)  # ranks compute meanwhile
    try:
        tap = build_tap()
        print(f"native recorder: {f'not used: {tap.refused}' if tap.refused else tap.library}")
    except TapUnusable as error:
        print(f"native recorder: not built: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

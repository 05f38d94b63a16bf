"""The picture of the dashboard in the documentation: ``make picture``."""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.launcher.dashboard.browser import browser, new_page
from tests.launcher.dashboard.serving import serve, show
from tests.launcher.dashboard.simulated import simulated


def main() -> None:
    """Write the picture to the path of the first argument."""
    path = Path(sys.argv[1]).absolute()
    with TemporaryDirectory() as folder, browser(Path(folder) / "profile") as devtools, new_page(devtools) as page:
        os.chdir(folder)  # the page shows the folder of the run
        with serve(simulated(Path("runs/pretrain"), nodes=4, per_node=8, tp=1)) as port:
            page.look(width=1280, height=1128)
            show(page, port)
            page.wait("document.querySelector('#plan .block')")
            page.screenshot(path, whole=False)


if __name__ == "__main__":
    main()

"""The wheel, built from the source distribution, works outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "launcher" / "dashboard" / "static"


def test_wheel_from_the_sdist_imports_outside_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    for expected in (
        "evermesh/__init__.py",
        "evermesh/py.typed",
        "evermesh/launcher/cli.py",
        "evermesh/deploy/jobs/quickstart.yaml",
        *(f"evermesh/launcher/dashboard/static/{path.name}" for path in STATIC.iterdir()),
        "evermesh/runtime/model/decoder.py",
        "evermesh/parallelism/attention/ring.py",
    ):
        assert expected in names
    assert not any(name.startswith(("tests/", "runtime/", "src/")) for name in names)
    program = (
        "import evermesh, evermesh.launcher.cli, evermesh.runtime.data, evermesh.checkpoint;"
        "from evermesh.parallelism import plan_batch; print(evermesh.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(site / "evermesh" / "__init__.py")

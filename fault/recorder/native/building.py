"""Building the native tap: once per version of torch and compiler, into the user's cache, and believed after a self-test.

``python -m evermesh.fault.recorder.native`` builds. Processes that train only look what is there: :func:`find_tap`.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from evermesh.fault.recorder.errors import TapUnusable
from evermesh.fault.recorder.ring_format import defines

SOURCE = Path(__file__).with_name("tap.cpp")
_BUILD_S = 600.0
_TEST_S = 120.0
_LINES = 8
"""Of what a compiler says."""


@dataclass(frozen=True, slots=True)
class BuiltTap:
    """A library that has passed the self-test, or what is known of one that has not."""

    library: str
    torch: str
    compiler: str
    refused: str = ""
    """Why it is not used; empty: it is."""


def cache_folder() -> Path:
    """Where libraries are kept; nobody else may write there, for they are loaded.

    Raises:
        TapUnusable: somebody else may, or it cannot be made.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evermesh/recorder"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise TapUnusable(f"there is no cache folder: {error}. Set XDG_CACHE_HOME to a folder of yours.") from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TapUnusable(f"{folder} may be written by others than user {os.getuid()}: chmod 700 it.")
    return folder


def find_tap(torch_version: str) -> Path:
    """The newest library for this torch that has passed its self-test.

    Raises:
        TapUnusable: there is none, or what there is was refused; says what to do.
    """
    found = [_read(file) for file in _by_age(cache_folder(), _stem(torch_version))]
    usable = [tap for tap in found if tap is not None and not tap.refused and Path(tap.library).is_file()]
    if usable:
        return Path(usable[-1].library)
    why = next((tap.refused for tap in reversed(found) if tap is not None and tap.refused), "")
    raise TapUnusable(why or f"none was built for torch {torch_version}. Build it: evermesh doctor")


def is_settled(torch_version: str) -> bool:
    """Whether building has been tried for this torch, with whatever result."""
    return bool(_by_age(cache_folder(), _stem(torch_version)))


def build_tap() -> BuiltTap:
    """Build the library for the torch of this interpreter, unless the cache has it, and test it in a process of its own.

    Safe against others who build at the same time: one of them does. What failed is kept too, so that it is not tried
    again before torch, the compiler or the source changes.

    Raises:
        TapUnusable: there is no compiler, or no cache.
    """
    import torch

    compiler, version = find_compiler()
    folder = cache_folder()
    name = f"{_stem(torch.__version__)}-{hashlib.sha256(version.encode()).hexdigest()[:8]}"
    told = folder / f"{name}.json"
    with _locked(folder / f"{name}.lock"):
        before = _read(told)
        if before is not None and (before.refused or Path(before.library).is_file()):
            return before
        library = folder / f"{name}.so"
        refused = _compile(compiler, library) or _test(library)
        tap = BuiltTap(str(library), torch.__version__, version, refused)
        new = told.with_suffix(".new")
        new.write_text(json.dumps(asdict(tap)))
        new.rename(told)
    return tap


def forget_taps() -> None:
    """Remove what the cache holds, refusals too; who has loaded a library keeps it."""
    for file in cache_folder().glob("tap-*"):
        if file.suffix != ".lock":
            file.unlink(missing_ok=True)


def find_compiler() -> tuple[str, str]:
    """Path of the C++ compiler, and the first line of what it says of itself.

    Raises:
        TapUnusable: there is none.
    """
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    compiler = next((found for name in wanted if (found := shutil.which(name))), None)
    if compiler is None:
        raise TapUnusable(f"no C++ compiler ({', '.join(wanted)}) is on PATH. Install g++, or set CXX.")
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30.0, check=False)
    return compiler, (done.stdout or compiler).splitlines()[0]


def torch_version() -> str | None:
    """The version of torch of this interpreter, without importing it; None: there is none."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        text = distribution("torch").read_text("METADATA") or ""
        file = Path(str(distribution("torch").locate_file("torch/version.py")))
        found = re.search(r"__version__ = '([^']+)'", file.read_text())
    except (PackageNotFoundError, OSError):
        return None
    return found[1] if found else re.findall(r"^Version: (.+)$", text, re.MULTILINE)[0]


def _stem(torch_version: str) -> str:
    """Names what is built of this source, with these places in the ring, for this torch."""
    content = SOURCE.read_bytes() + json.dumps(defines(), sort_keys=True).encode()
    return f"tap-{torch_version}-{os.uname().machine}-{hashlib.sha256(content).hexdigest()[:12]}"


def _compile(compiler: str, library: Path) -> str:
    """Compile into a file of its own, which then becomes ``library``. Returns why that failed; empty: it has not."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".building-") as folder:
        output = Path(folder) / "tap.so"
        command = [
            compiler,
            *("-std=c++20" if _needs_cpp20(torch.__version__) else "-std=c++17", "-O2", "-fPIC", "-shared", "-w"),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-D{name}={value}" for name, value in defines().items()),
            *(f"-isystem{path}" for path in include_paths()),
            str(SOURCE),
            *(f"-L{path}" for path in library_paths()),
            *("-lc10", "-ltorch_cpu", "-o", str(output)),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S, check=False, cwd=folder)
        except subprocess.TimeoutExpired:
            return f"{compiler} took more than {_BUILD_S:.0f} s"
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return f"{compiler} cannot build the tap for torch {torch.__version__}: " + "\n".join(errors[:_LINES])
        output.rename(library)
    return ""


def _needs_cpp20(version: str) -> bool:
    numbers = re.findall(r"\d+", version)
    return (int(numbers[0]), int(numbers[1])) >= (2, 10)


def _test(library: Path) -> str:
    """Run the self-test in a process of its own, for it may crash. Returns why it failed; empty: it has not."""
    command = [sys.executable, "-m", "evermesh.fault.recorder.native.self_test", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TEST_S, check=False)
    except subprocess.TimeoutExpired:
        return f"the self-test of the native tap took more than {_TEST_S:.0f} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return f"the self-test of the native tap failed ({done.returncode}): {lines[-1] if lines else 'no word'}"


def _by_age(folder: Path, stem: str) -> list[Path]:
    return sorted(folder.glob(f"{stem}-*.json"), key=lambda file: file.stat().st_mtime)


def _read(file: Path) -> BuiltTap | None:
    try:
        return BuiltTap(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock that the kernel takes from whoever dies."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

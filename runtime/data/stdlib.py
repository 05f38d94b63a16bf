"""A corpus that every machine has: the source of the Python standard library."""

import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from platform import python_version

import xxhash

from evermesh.runtime.data.corpus import FORMAT_VERSION
from evermesh.runtime.data.documents import InputFile, walk
from evermesh.runtime.data.errors import CorpusExists
from evermesh.runtime.data.prepare import Progress, prepare
from evermesh.runtime.data.tokenizer import TrainBpe

# Distributions split tests and the editor off, or delete them: without them the corpus is the same on more machines.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "idle_test"}
)


def stdlib_corpus(vocabulary: int, cache: Path, *, progress: Progress | None = None, wait_s: float = 600.0) -> Path:
    """The directory of the standard library's corpus with a BPE of ``vocabulary`` entries, made if not in ``cache``.

    Processes that ask at once make it once. Its name holds what its content depends on: Python, source, tokenizers.

    Args:
        wait_s: seconds to wait for another process that makes it.

    Raises:
        CorpusBusy: another process did not finish it within ``wait_s``.
        CorpusEmpty: this Python has no source files.
    """
    files = stdlib_files()
    path = cache / f"stdlib-{python_version()}-{vocabulary}-{_digest(files)}"
    if not path.exists():
        with suppress(CorpusExists):  # made by another process while this one waited
            prepare(files, path, TrainBpe(vocabulary), progress=progress, wait_s=wait_s)
    return path


def stdlib_files() -> list[InputFile]:
    """The source files of the standard library, sorted by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [file for file in walk(root, _SKIPPED_FOLDERS) if file.name.endswith(".py")]


def _digest(files: Sequence[InputFile]) -> str:
    digest = xxhash.xxh3_64(f"{FORMAT_VERSION} {version('tokenizers')}\n".encode())
    for file in files:
        content = file.path.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()

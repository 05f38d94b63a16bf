"""A preparation that is killed at any moment goes on, and ends with the bytes of one that was not."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.data.conftest import TEXTS

# Writes half of the block of the n-th write of this process, as a process that is killed in it may, and dies.
PREPARE = """
import os, signal, sys
from pathlib import Path
from evermesh.runtime.data import TokenizerFile, TrainBpe, files, prepare

folder, output, tokenizer, kill_at = sys.argv[1:]
writes, write = 0, files.HashedFile.write

def dying_write(file, block):
    global writes
    writes += 1
    if writes == int(kill_at):
        write(file, memoryview(block).cast("B")[: memoryview(block).nbytes // 2])
        file._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, block)

files.HashedFile.write = dying_write
source = TokenizerFile(Path(tokenizer)) if tokenizer else TrainBpe(300)
corpus = prepare([Path(folder)], Path(output), source, progress=lambda done, total, name: print(name, flush=True))
corpus.verify()
"""


def run(folder: Path, output: Path, tokenizer: Path | None, kill_at: int) -> tuple[int, list[str]]:
    """Exit status and the files that were encoded."""
    arguments = [str(folder), str(output), str(tokenizer or ""), str(kill_at)]
    ended = subprocess.run([sys.executable, "-c", PREPARE, *arguments], stdout=subprocess.PIPE, text=True, timeout=60)
    return ended.returncode, ended.stdout.split()


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "texts"
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text)
    (path / "5.jsonl").write_text('{"text": "one two", "loss_spans": [[0, 3]]}\n{"text": "three"}\n' * 3)
    return path


@pytest.mark.parametrize("trained", [True, False])
def test_a_preparation_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer_file: Path, folder: Path, trained: bool
) -> None:
    tokenizer = None if trained else tokenizer_file
    status, _ = run(folder, tmp_path / "clean" / "corpus", tokenizer, 0)
    assert status == 0
    killed = 0
    for kill_at in (1, 2, 8, 5, 7, 3, 20, 8, 5):
        status, _ = run(folder, tmp_path / "killed" / "corpus", tokenizer, kill_at)
        killed += status == -signal.SIGKILL
        assert (tmp_path / "killed" / "corpus").exists() == (status == 0)
        if status == 0:
            break
    assert killed >= 5
    if status != 0:
        assert run(folder, tmp_path / "killed" / "corpus", tokenizer, 0)[0] == 0
    assert content(tmp_path / "killed" / "corpus") == content(tmp_path / "clean" / "corpus")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["corpus"]


def test_finished_parts_are_not_encoded_again(tmp_path: Path, tokenizer_file: Path, folder: Path) -> None:
    status, first = run(folder, tmp_path / "corpus", tokenizer_file, 11)
    assert status == -signal.SIGKILL
    assert first == ["0.txt", "1.txt", "2.txt"]
    status, second = run(folder, tmp_path / "corpus", tokenizer_file, 0)
    assert status == 0
    assert second == ["3.txt", "4.txt", "5.jsonl"]

"""Where commands print: tables in one piece, and output that nobody takes any more."""

import subprocess
import sys

import pytest
from rich.table import Table

from evermesh.launcher.terminal import print_table

PRINTS = """
import sys
from evermesh.launcher.terminal import lasting_console
console = lasting_console()
for number in range(2_000):
    console.print(f"line {number}")
print("still here", file=sys.stderr)
"""


def test_a_reader_that_goes_away_does_not_end_the_writer() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout
        assert writer.stderr
        assert writer.stdout.readline() == "line 0\n"
        writer.stdout.close()
        assert writer.stderr.read() == "still here\n"
    assert writer.returncode == 0


def test_a_full_disk_under_the_output_does_not_end_the_writer() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS], stdout=full, stderr=subprocess.PIPE, text=True, check=True
        )
    assert done.stderr == "still here\n"


def test_paths_are_never_folded_however_narrow_the_terminal_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = f"/{'long/' * 20}path"
    table = Table("name", "directory", box=None)
    table.add_row("run", path)
    print_table(table)
    assert path in capsys.readouterr().out

"""``evermesh checkpoint verify`` and ``repair``."""

import json
from pathlib import Path

import typer

from evermesh.launcher.commands.checkpoint.places import AsJson, PlaceArgument, newest_checkpoint
from evermesh.launcher.commands.jobs import Runs

VERIFY_EXAMPLES = "[bold]Example[/]\n\n  evermesh checkpoint verify quickstart"
REPAIR_EXAMPLES = "[bold]Example[/]\n\n  evermesh checkpoint repair runs/quickstart"


def verify(place: PlaceArgument = None, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Read a checkpoint of any format (of a run the newest one) and check every byte; exit code 1 if something is wrong."""
    from evermesh import checkpoint

    report = checkpoint.verify(newest_checkpoint(place, runs))
    if as_json:
        problems = [
            {"kind": p.kind, "file": p.file, "text": p.text, "repairable": p.repairable} for p in report.problems
        ]
        told = {
            "path": str(report.path),
            "ok": report.ok,
            "bytes": report.bytes_read,
            "checksums": report.has_checksums,
        }
        print(json.dumps(told | {"problems": problems}))
    else:
        for problem in report.problems:
            print(f"{problem.kind}: {problem.file}: {problem.text}{'; repairable' if problem.repairable else ''}")
        count = len(report.problems)
        verdict = "whole" if report.ok else f"damaged, {count} problem{'' if count == 1 else 's'}"
        print(f"{report.path}: {verdict}; {report.num_files} files, {report.bytes_read:,} bytes read")
        if not report.has_checksums:
            print("its format has no checksums: all of it can be read, but a flipped bit would not be seen")
    raise typer.Exit(0 if report.ok else 1)


def repair(place: PlaceArgument = None, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Write lost and damaged files of a checkpoint again, from its parity; exit code 1 if something stays wrong."""
    from evermesh import checkpoint

    report = checkpoint.repair(newest_checkpoint(place, runs))
    if as_json:
        left = [{"kind": p.kind, "file": p.file, "text": p.text} for p in report.left]
        print(json.dumps({"path": str(report.path), "repaired": report.repaired, "left": left}))
    else:
        for problem in report.left:
            print(f"{problem.kind}: {problem.file}: {problem.text}")
        count = len(report.repaired)
        verdict = f"{count} file{'' if count == 1 else 's'} written again"
        print(f"{report.path}: {verdict}; {'whole' if not report.left else 'still damaged'}")
        for name in report.repaired:
            print(f"  {name}")
    raise typer.Exit(1 if report.left else 0)

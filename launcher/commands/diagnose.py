"""``evermesh diagnose``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from evermesh.fault.detectors import Diagnosis

EXAMPLES = """[bold]Examples[/]

  evermesh diagnose runs/quickstart        [dim]# a job of this machine, living or ended[/]

  evermesh diagnose records.jsonl

  evermesh diagnose /tmp/nccl_trace_rank_*

  evermesh diagnose --json dump_0.json dump_1.json

Reads the records of a run by its directory (of a script by the folder of its logs), rings, records as JSON lines,

and dumps of torch's flight recorder, of NCCL and of gloo, as pickle (which is read without executing anything)

or JSON, whose names end in the rank.

Exit code 0 if nothing was found, 1 if something was, 2 if a file cannot be read."""


def diagnose(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="RUN|FILE...", help="A run, or records or dumps of one job.", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """Say which rank, node or link made a job hang or slow, from the records of its collectives."""
    from evermesh.fault.detectors import Context
    from evermesh.fault.detectors import diagnose as diagnose_traces
    from evermesh.fault.errors import RecordsUnreadable
    from evermesh.fault.recorder.files import read_files, read_job

    for path in files:
        if not path.is_file() and not (path.is_dir() and len(files) == 1):
            fact = "give one run at a time, or only files" if path.is_dir() else "there is no such file or directory"
            raise RecordsUnreadable(str(path), fact)
    traces, processes = read_job(files[0]) if files[0].is_dir() else (read_files(files), {})
    found = diagnose_traces(traces, Context(processes=processes))
    if as_json:
        print(_as_json(found))
    else:
        _print(found)
    raise typer.Exit(1 if found.findings else 0)


def _as_json(found: "Diagnosis") -> str:
    return json.dumps(
        {
            "ranks": found.num_ranks,
            "records": found.num_records,
            "findings": [finding.model_dump(mode="json") for finding in found.findings],
            "exonerated": list(found.exonerated),
        },
        indent=1,
    )


def _print(found: "Diagnosis") -> None:
    console = Console()
    for finding in found.findings:
        console.print(f"[bold red]{finding.kind}[/]", highlight=False, end="  ")
        console.print(f"{finding.text} ({finding.confidence:.0%} sure)", highlight=False, markup=False, soft_wrap=True)
    for sentence in found.exonerated:
        console.print("[green]no fault[/]", highlight=False, end="  ")
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    what = f"{found.num_records:,} records of {found.num_ranks:,} ranks"
    console.print(f"nothing found in {what}" if not found.findings else f"from {what}", highlight=False)

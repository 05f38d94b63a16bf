"""``evermesh deploy``: what carries a job to Slurm, Docker or Kubernetes, as files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evermesh.launcher.commands.jobs import Set

if TYPE_CHECKING:
    from evermesh.deploy import Deployment

EXAMPLES = """[bold]Examples[/]

  evermesh deploy slurm job.yaml --time 24:00:00 --output out

  evermesh deploy docker job.yaml --output out && docker compose --project-directory out up

  evermesh deploy kubernetes job.yaml --image registry/evermesh:1 --claim shared-runs"""

Job = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder for the files.")]

app = typer.Typer(
    name="deploy",
    help="Write what carries a job to Slurm, Docker or Kubernetes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog=EXAMPLES,
)


@app.command(epilog=EXAMPLES)
def slurm(
    job: Job,
    output: Output = Path("deployed"),
    time_limit: Annotated[
        str, typer.Option("--time", help="Time limit of one start, as sbatch takes it.")
    ] = "12:00:00",
    overrides: Set = None,
) -> None:
    """Write a batch script that saves before its time limit, queues itself again and goes on."""
    from evermesh.deploy import render_slurm

    _write(output, render_slurm(_deployment(job, overrides), time_limit=time_limit))


@app.command(epilog=EXAMPLES)
def docker(job: Job, output: Output = Path("deployed"), overrides: Set = None) -> None:
    """Write a Dockerfile for the device of the job, and a compose file that runs it on one machine."""
    from evermesh.deploy import render_docker

    _write(output, render_docker(_deployment(job, overrides)))


@app.command(epilog=EXAMPLES)
def kubernetes(
    job: Job,
    image: Annotated[
        str, typer.Option("--image", help="Image that all nodes run; `deploy docker` writes its Dockerfile.")
    ],
    claim: Annotated[
        str, typer.Option("--claim", help="PersistentVolumeClaim for the runs, shared by all pods.")
    ] = "runs",
    output: Output = Path("deployed"),
    overrides: Set = None,
) -> None:
    """Write an indexed Job, its Service and the job file as manifests; its pods are one Ray cluster."""
    from evermesh.deploy import render_kubernetes

    _write(output, render_kubernetes(_deployment(job, overrides), image=image, claim=claim))


def _deployment(job: Path, overrides: list[str] | None) -> "Deployment":
    import re
    from importlib.metadata import version

    import yaml

    from evermesh import __version__
    from evermesh.deploy import Deployment
    from evermesh.launcher.job_file import load_job
    from evermesh.runtime.config import CpuDevice

    config = load_job(job, overrides or ())
    device = config.train.device
    return Deployment(
        name=re.sub(r"[^a-z0-9]+", "-", f"job-{config.name}".lower()).strip("-")[:40].strip("-"),
        job_file=str(job.absolute()),
        job=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        runs=str(config.runs.absolute()),
        nodes=config.nodes,
        spares=config.spares,
        workers=config.workers // config.nodes,
        device=device.kind,
        threads=device.threads if isinstance(device, CpuDevice) else 1,
        grace_s=config.grace_s,
        version=__version__,
        torch=version("torch").partition("+")[0],
    )


def _write(output: Path, files: Mapping[str, str]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (output / name).write_text(text)
        print(output / name)

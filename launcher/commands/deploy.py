"""``evermesh deploy``: what carries a job to Slurm, Docker or Kubernetes, and what watches it there, as files."""

import re
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

  evermesh deploy kubernetes job.yaml --image registry/evermesh:1 --claim shared-runs

  evermesh deploy kuberay job.yaml --image registry/evermesh:1 --claim shared-runs

  evermesh deploy monitoring --targets /shared/prometheus --token-file /etc/prometheus/evermesh-token"""

_FIRST_RAY = (2, 52, 0)
"""With tokens."""
Job = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)]
Image = Annotated[str, typer.Option("--image", help="Image that all nodes run; `deploy docker` writes its Dockerfile.")]
Claim = Annotated[str, typer.Option("--claim", help="PersistentVolumeClaim for the runs, shared by all pods.")]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder for the files.")]

app = typer.Typer(
    name="deploy",
    help="Write what carries a job to Slurm, Docker or Kubernetes, and what watches it.",
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
def docker(
    job: Job,
    output: Output = Path("deployed"),
    monitoring: Annotated[
        bool, typer.Option("--monitoring/--no-monitoring", help="With Prometheus and Grafana beside the job.")
    ] = True,
    overrides: Set = None,
) -> None:
    """Write a Dockerfile for the device of the job, and a compose file that runs and watches it on one machine."""
    from evermesh.deploy import render_docker

    _write(output, render_docker(_deployment(job, overrides), monitoring=monitoring))


@app.command(epilog=EXAMPLES)
def kubernetes(
    job: Job,
    image: Image,
    claim: Claim = "runs",
    output: Output = Path("deployed"),
    overrides: Set = None,
) -> None:
    """Write an indexed Job, its Service and the job file as manifests; its pods are one Ray cluster."""
    from evermesh.deploy import render_kubernetes

    _write(output, render_kubernetes(_deployment(job, overrides), image=image, claim=claim))


@app.command(epilog=EXAMPLES)
def kuberay(
    job: Job,
    image: Image,
    claim: Claim = "runs",
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="VERSION", help="Ray in the image.", show_default="that of here")
    ] = None,
    output: Output = Path("deployed"),
    overrides: Set = None,
) -> None:
    """Write a RayJob for KubeRay: its head launches the job, its workers are the nodes and spares."""
    from evermesh.deploy import render_kuberay

    version = ray or _ray_here()
    if not re.fullmatch(r"\d+\.\d+\.\d+", version) or tuple(map(int, version.split("."))) < _FIRST_RAY:
        raise typer.BadParameter(
            f"--ray {version}: tokens need Ray 2.52.0 or later in the image, such as --ray 2.60.0."
        )
    _write(output, render_kuberay(_deployment(job, overrides), image=image, ray=version, claim=claim))


@app.command(epilog=EXAMPLES)
def monitoring(
    targets: Annotated[
        str,
        typer.Option(
            "--targets", metavar="PATH", help="Folder (api.targets) or file in which jobs tell where they are."
        ),
    ],
    token_file: Annotated[
        str, typer.Option("--token-file", metavar="FILE", help="The token of the jobs, as Prometheus sees it.")
    ],
    prometheus: Annotated[
        str, typer.Option("--prometheus", metavar="URL", help="Where Grafana reaches Prometheus.")
    ] = "http://localhost:9090",
    output: Output = Path("deployed"),
) -> None:
    """Write configuration, alerts and a dashboard for Prometheus and Grafana; for no job in particular."""
    from evermesh.deploy import render_monitoring

    _write(output, render_monitoring(targets=targets, token_file=token_file, prometheus=prometheus))


def _ray_here() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ray")
    except PackageNotFoundError:
        raise typer.BadParameter(
            "Ray is not installed here. Say which version is in the image: --ray 2.52.0."
        ) from None


def _deployment(job: Path, overrides: list[str] | None) -> "Deployment":
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
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
        print(output / name)

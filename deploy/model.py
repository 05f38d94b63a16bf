"""What is to be deployed."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, StringConstraints

Label = Annotated[str, StringConstraints(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$", max_length=40)]
"""A name that Kubernetes takes everywhere."""


class Deployment(BaseModel):
    """One job, as far as the place where it runs has to know it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Label
    """Of what is made in the place."""
    job_file: str
    """Path of the job file, as the batch script or the person who builds the image sees it."""
    job: str
    """Content of the job file."""
    runs: str
    """Folder of the runs."""
    nodes: PositiveInt
    spares: NonNegativeInt = 0
    workers: PositiveInt
    """On each node."""
    device: Literal["cpu", "cuda"]
    threads: PositiveInt = 1
    """CPUs of each worker."""
    grace_s: PositiveFloat
    """What a job may need from SIGTERM until it is saved, seconds."""
    version: str
    """Of Evermesh."""
    torch: str
    """Version of torch."""

    @property
    def stop_s(self) -> int:
        """How long the place must wait after SIGTERM before it kills: the job saves, tells its end, and agents leave."""
        return int(self.grace_s) + 35

    @property
    def cpus(self) -> int:
        """On each node: those of its workers. Agent, keeper and controller need next to nothing."""
        return self.workers * self.threads


def how_to_watch(runs: str) -> str:
    """Where Prometheus learns of a run in this folder, for those who read what was rendered."""
    return (
        f"Prometheus: file_sd on {runs}/RUN/prometheus.json, credentials_file {runs}/RUN/token; alerts and a dashboard: "
        "evermesh deploy monitoring"
    )

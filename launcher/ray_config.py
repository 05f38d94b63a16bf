"""What a job asks of a Ray cluster besides its nodes; imports no Ray. Other places have no use for it."""

from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, field_validator

_OURS = ("CPU", "GPU")


class RuntimeEnvConfig(BaseModel):
    """Ray's runtime environment of agents and workers, prepared on every node before the agent starts.

    What is said here goes before what a submission (``ray job submit``) says; all else of a submission holds too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    env_vars: dict[str, str] = {}
    """Environment variables. They go before those of the shell that are passed on."""
    working_dir: str | None = None
    """Folder or URI (``gcs://``, ``s3://``, ``https://``) that is copied to every node and imported from. Workers start in
    it, unless the folder of ``evermesh launch`` is there on the node too."""
    excludes: tuple[str, ...] = ()
    """Patterns, as in ``.gitignore``, of files that are not copied."""
    py_modules: tuple[str, ...] = ()
    """Folders of packages, wheels or URIs that are copied to every node and may be imported."""

    def told(self) -> dict[str, Any]:
        """As Ray takes it: only what was said."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value}


class RayConfig(BaseModel):
    """Options of a Ray cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime_env: RuntimeEnvConfig = RuntimeEnvConfig()
    """What is prepared on every node before its agent starts."""
    resources: dict[str, PositiveFloat] = {}
    """Resources that each node gives to the job besides CPUs and GPUs, such as ``{memory: 1e9, fast: 1}``."""
    label_selector: dict[str, str] = {}
    """Labels that each node must have, in Ray's notation: ``{market-type: "!spot", region: "in(a,b)"}``. From Ray 2.49 on."""
    spare_wait_s: PositiveFloat = 5.0
    """How long the cluster may look for a node for a spare before the job begins with one spare less, seconds. With an
    autoscaler: at least as long as a machine takes to come."""

    @field_validator("resources")
    @classmethod
    def _only_others(cls, resources: dict[str, float]) -> dict[str, float]:
        for kind in _OURS:
            if kind in resources:
                raise ValueError(f"{kind} follows from workers, nodes and train.device; name only other resources")
        return resources

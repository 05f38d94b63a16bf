"""What jobs that run at the same time load the links of a cluster with: a file that every planned job adds itself to."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, ValidationError

from evermesh.launcher.errors import TrafficRequestInvalid
from evermesh.parallelism.fabric.paths import Loads
from evermesh.parallelism.fabric.wiring import Wiring

_FORMAT = "evermesh-link-loads-1"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: str
    jobs: dict[str, dict[str, NonNegativeFloat]]
    """By job, by link ``FROM>TO``: bytes per second, the mean over a step."""


@dataclass(frozen=True, slots=True)
class Registry:
    """The loads of all jobs that are known; without a ``path`` of none."""

    path: Path | None
    jobs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> "Registry":
        """What is in the file; nothing, if there is none yet.

        Raises:
            TrafficRequestInvalid: it is something else.
        """
        if path is None or not path.exists():
            return cls(path)
        try:
            found = _Document.model_validate_json(path.read_text())
        except (ValidationError, OSError, UnicodeDecodeError) as error:
            raise TrafficRequestInvalid(
                f"{path} is no file of link loads: {error}. Give one, or a path for a new one."
            ) from error
        if found.format != _FORMAT:
            raise TrafficRequestInvalid(
                f"{path} has format {found.format}; this version reads {_FORMAT}. Give a new path."
            )
        return cls(path, found.jobs)

    def loads(self, job: str, wiring: Wiring, step_s: float) -> Loads | None:
        """Bytes of all jobs but this one while it runs a step; None: nothing is known of any."""
        total: Counter[str] = Counter()
        for name, links in self.jobs.items():
            if name != job:
                for link, bytes_per_s in links.items():
                    total[link] += bytes_per_s * step_s  # type: ignore[assignment]
        return Loads.from_names(total, wiring) if total else None

    def write(self, job: str, loads: Loads, wiring: Wiring, step_s: float) -> None:
        """Add this job, or replace what was said of it; ``loads`` are its own, bytes of a step."""
        assert self.path is not None
        own = {link: num_bytes / step_s for link, num_bytes in loads.named(wiring).items()}
        document = {"format": _FORMAT, "jobs": {**self.jobs, job: own}}
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(document, indent=1) + "\n")
        beside.replace(self.path)


__all__ = ["Registry"]

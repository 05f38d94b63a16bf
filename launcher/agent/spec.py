"""What an agent is told when it starts."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt


class AgentSpec(BaseModel):
    """One node of one job; holds no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: Path
    """Directory of the run."""
    node: str
    address: str
    """Where the ranks of this node are reached."""
    slots: PositiveInt
    """Ranks that it may have to run."""
    warm_module: str
    """What the warm process loads before any worker is needed."""
    threads: PositiveInt = 1
    revives: bool = False
    """It shares a machine with the controller, and starts it again should it die."""
    is_head: bool = False
    """It is the node that the first controller of the job counts to."""
    journal_folder: Path | None = None
    """Where it keeps its copy of the journal and what it has promised; None: it takes no part in elections."""
    metrics: bool = True
    """Whether it serves numbers of its node."""
    metrics_host: str = ""
    """On what it serves them; empty: on ``address``."""
    preflight: Literal["quick", "full", "off"] = "off"
    """What is looked at before the node is offered."""
    health_every_s: PositiveFloat | None = None
    """How often it is looked at later, seconds; None: never."""
    labels: dict[str, str] = {}
    """Of the node, where its place has labels: they may name its rack."""
    orphan_limit_s: PositiveFloat = 600.0
    """Without a controller and without ranks to run it leaves after this time, seconds."""

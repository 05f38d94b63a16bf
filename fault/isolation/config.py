"""When nodes are isolated; imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat


class IsolationConfig(BaseModel):
    """What is done about nodes that evidence speaks against. A cordon, or its end, by a person wins over all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: Literal["advise", "act"] = "advise"
    """``advise``: decisions are told and not carried out; ``act``: they are."""
    per_hour: NonNegativeInt = 2
    """Nodes that the job may drain or replace by itself within an hour."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Of the nodes of the job, spares included, that may be set aside by itself at a time; at least one."""
    persist_s: PositiveFloat = 600.0
    """Seconds for which a node must have been late before that may lead to a drain, and with its share degraded."""
    false_alarm_s: NonNegativeFloat = 300.0
    """What it costs to set a healthy node aside, beside what the job pays itself, as seconds of the job."""
    replacement_s: PositiveFloat = 4 * 3600.0
    """After how long a node that was set aside without a spare is expected to be made up for."""
    horizon_s: PositiveFloat = 24 * 3600.0
    """How far costs are added up where the end of the job is not known."""
    cordon_for_s: PositiveFloat = 24 * 3600.0
    """For how long other jobs are kept from a node that this one has set aside by itself."""


def _read(value: Any) -> Any:
    """``off``, ``advise`` and ``act`` stand for whole configurations."""
    if value in (False, "off"):
        return None
    if value in (True, "on"):
        return IsolationConfig()
    return {"mode": value} if isinstance(value, str) else value


Isolation = Annotated[IsolationConfig | None, BeforeValidator(_read)]
"""Field of a job; None: no evidence is kept, and nothing is decided. Cordons of people count nevertheless."""

"""What the API answers besides what was asked for, as its description tells it; imports no torch."""

from typing import Annotated, Any

from fastapi import Query, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Refusal(_Answer):
    """Why there is no other answer."""

    detail: str


class Problem(_Answer):
    """One thing that is wrong with a request."""

    where: tuple[str | int, ...]
    what: str


class Problems(_Answer):
    """All that is wrong with a request, without what it said: that may hold numbers that are no JSON."""

    detail: tuple[Problem, ...]


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refusal, "description": "The body is not what it says it is"},
    401: {"model": Refusal, "description": "The token of the run is missing or wrong"},
    413: {"model": Refusal, "description": "The body is too long"},
    422: {"model": Problems, "description": "The request says something that cannot be meant"},
}
"""Of every route below ``/api``."""

TOKEN = Security(HTTPBearer(auto_error=False, description="The token of the run"))
"""Tells that a route asks for it; who has none never comes so far."""

After = Annotated[int, Query(ge=0, lt=1 << 63)]
"""Number of the last line that is known already."""

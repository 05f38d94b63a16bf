"""What is kept of nodes, one JSON object per line."""

import getpass
import uuid
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from evermesh.fault.cluster.identity import NodeIdentity, host_name

LONGEST_TEXT = 500


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    """The same record may be read twice, and counts once."""
    time_s: float
    """Wall clock, seconds since 1970."""


class Evidence(_Record):
    """Something that speaks against a node."""

    record: Literal["evidence"] = "evidence"
    node: NodeIdentity
    kind: str
    """What was seen: a kind of finding, such as ``slow rank``, ``process died``, ``node lost``, ``health bad``."""
    weight: float = Field(default=1.0, ge=0, le=1)
    """Share of the blame that falls on this node: half for each end of a link."""
    confidence: float = Field(default=1.0, ge=0, le=1)
    """Probability that what was seen is true."""
    job: str = ""
    launch: str = ""
    """Tells runs of one name apart."""
    text: str = ""
    """For people."""


class Cordon(_Record):
    """No job is to use a node from now on."""

    record: Literal["cordon"] = "cordon"
    node: str
    """HOST/PLACE, a whole HOST, or an address."""
    machine: str = ""
    """Only this machine of that name; empty: whichever has the name."""
    by: str
    because: str
    until_s: float | None = None
    """Wall clock; None: until it is lifted."""

    def is_over(self, now_s: float) -> bool:
        """Whether its time has passed."""
        return self.until_s is not None and now_s >= self.until_s


class Uncordon(_Record):
    """Jobs may use a node again, and what spoke against it before is forgiven."""

    record: Literal["uncordon"] = "uncordon"
    node: str
    by: str
    because: str = ""


Record = Annotated[Evidence | Cordon | Uncordon, Field(discriminator="record")]
RecordAdapter: TypeAdapter[Record] = TypeAdapter(Record)


def shortened(text: str) -> str:
    """The first line of ``text``, not longer than a record may be."""
    first = text.strip().partition("\n")[0]
    return first if len(first) <= LONGEST_TEXT else f"{first[: LONGEST_TEXT - 3]}..."


def who() -> str:
    """USER@HOST of this process."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        user = "somebody"
    return f"{user}@{host_name()}"

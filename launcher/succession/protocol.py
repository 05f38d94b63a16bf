"""What a controller and the agents of its job say to each other about copies of the journal and about terms.

A *term* is one office of a controller: its number only grows, and belongs to one place for good. A *view* says who votes on
the next one (*members*) and who holds a whole copy of the journal (*holders*). One JSON object per message; imports no torch.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Seat(_Message):
    """One member: an agent with what it remembers."""

    identity: str
    """Of its memory on disk: an agent whose disk is gone is another member, for it has forgotten what it promised."""
    node: str
    url: str
    """Where it is asked, such as ``ws://10.0.0.7:4321``."""


class View(_Message):
    """Who takes part; the newest one is the one with the highest ``version``."""

    launch: PositiveInt
    """Number of the journal's entry ``launch``: what is of an older launch of the run counts no more."""
    term: PositiveInt
    number: NonNegativeInt
    """Of the views of this term."""
    leader: str | None
    """Node that shares a machine with the controller; None: no node does."""
    machine: str
    """Where it runs, by the start of the kernel there: no other machine can tell by a lock whether it lives."""
    controller: str
    """Where the controller is reached, such as ``http://10.0.0.7:4321``."""
    members: tuple[Seat, ...] = ()
    holders: tuple[str, ...] = ()
    """Identities of members."""

    @property
    def version(self) -> tuple[int, int, int]:
        return self.launch, self.term, self.number

    @property
    def identities(self) -> frozenset[str]:
        return frozenset(seat.identity for seat in self.members)

    def seat_of(self, node: str) -> Seat | None:
        """The seat of ``node``, if it has one."""
        return next((seat for seat in self.members if seat.node == node), None)


class Peek(_Message):
    """How are things? Changes nothing."""

    kind: Literal["peek"] = "peek"


class Vote(_Message):
    """Promise to obey no term below this one, which is asked for once in the life of a job."""

    kind: Literal["vote"] = "vote"
    launch: int
    term: PositiveInt


class Confirm(_Message):
    """Do you still know of no higher term?"""

    kind: Literal["confirm"] = "confirm"
    launch: int
    term: int


class Install(_Message):
    """This is the view from now on."""

    kind: Literal["install"] = "install"
    view: View


class Append(_Message):
    """Keep these lines behind line ``after`` of the journal."""

    kind: Literal["append"] = "append"
    launch: int
    term: int
    after: NonNegativeInt
    digest: str
    """Of the journal up to there."""
    lines: tuple[str, ...]


Request = Annotated[Peek | Vote | Confirm | Install | Append, Field(discriminator="kind")]
RequestAdapter: TypeAdapter[Request] = TypeAdapter(Request)


class Answer(_Message):
    """What a member says to any request, as of behind it."""

    identity: str
    accepted: bool
    launch: int
    promised: int
    """The highest term that it has promised, or accepted a message of."""
    length: int
    """Lines of its copy."""
    view: View | None
    """The newest that it has accepted."""
    hears: bool = False
    """It is connected to a controller that it obeys."""
    is_reviving: bool = False
    """It is starting the controller of this term again, or has just been elected and starts the one of the next."""

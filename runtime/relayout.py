"""A running job goes on with another layout: who wants it, whether it can be, and what moves, between two steps."""

import gc
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, ValidationError

from evermesh.checkpoint.relayout import Carrier, Moved
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.layout.explain import degrees_of, fields_of
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.layout import changed_layout, check_layout
from evermesh.runtime.state import GivenUp

if TYPE_CHECKING:
    from evermesh.runtime.trainer import Trainer

_CALL_SITE = "relayout"


@dataclass(frozen=True, slots=True)
class Move:
    """A layout to go on with."""

    layout: Layout
    reason: str


class Relayout:
    """Moves a trainer between layouts; between two steps all ranks do what rank 0 wishes."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self._wished: Move | None = None
        self._since_s: float | None = None
        """When the move under way began."""
        self._seconds, self._num_bytes = 0.0, 0

    @property
    def is_wished(self) -> bool:
        """Whether this rank wants another layout; on rank 0."""
        return self._wished is not None

    def wish(self, changes: Mapping[str, JsonValue] | Layout, reason: str) -> None:
        """Want to go on, behind the step under way, with the layout in use and these changes to it, or with another. On rank
        0; what cannot be is told in the event log, and nothing changes."""
        trainer = self._trainer
        try:
            layout = changes if isinstance(changes, Layout) else changed_layout(trainer.config.layout, changes)
            self._check(layout)
        except (ValidationError, LayoutDoesNotFit) as error:
            trainer.reporter.log("layout refused", f"{reason}: {_told(error)}", changes=_values(changes))
            return
        self._wished = Move(layout, reason)

    def agree(self) -> Move:
        """What rank 0 wishes. Collective; rank 0 wishes something."""
        host, payload = self._trainer.groups.host, None
        if self._wished is not None:
            values = {"layout": self._wished.layout.model_dump(mode="json"), "reason": self._wished.reason}
            payload = json.dumps(values).encode()
        found = json.loads(host.broadcast_bytes(payload if host.rank == 0 else None, 0, _CALL_SITE))
        self._wished, self._since_s = None, time.monotonic()
        return Move(Layout.model_validate(found["layout"]), found["reason"])

    def go(self, move: Move) -> Moved:
        """Go on with another layout, between two steps, when nothing is being saved or planned. Collective.

        The state moves in memory, bit for bit; every rank then has what it would have loaded from a checkpoint. Peak memory
        is that of the new layout, what this rank owned of the state in the old one, and the messages under way.

        Raises:
            LayoutDoesNotFit: the trainer cannot run it. Nothing has changed.
        """
        trainer, began_s = self._trainer, time.monotonic()
        before, groups, config = trainer.config.layout, trainer.groups, self._check(move.layout)
        groups.moment.phase = "checkpoint"
        state = trainer.state.give_up()
        trainer.dismantle()
        gc.collect()  # models and their hooks refer to each other, and their buffers are as large as all else
        trainer.build(config, initialize=False, before=groups)
        moved = self._move_state(state)
        groups.leave(trainer.groups)
        self._num_bytes += moved.total_bytes
        self._tell(before, move, moved, time.monotonic() - began_s)
        return moved

    def note_step_begins(self) -> None:
        """What was in the way of the next step is over."""
        if self._since_s is not None:
            self._seconds += time.monotonic() - self._since_s
            self._since_s = None

    def take(self) -> tuple[float, int]:
        """Since the last call: seconds that no step was under way because of a move, and the bytes that moved."""
        taken, self._seconds, self._num_bytes = (self._seconds, self._num_bytes), 0.0, 0
        return taken

    def _move_state(self, state: GivenUp) -> Moved:
        trainer = self._trainer
        carrier = Carrier(trainer.groups.world, trainer.groups.host, trainer.device)
        with trainer.groups.listen(trainer.reporter.ledger):
            return trainer.state.take_over(state, carrier)

    def _check(self, layout: Layout) -> TrainConfig:
        """The configuration with this layout. Raises ``LayoutDoesNotFit`` if the trainer cannot run it from here on."""
        trainer = self._trainer
        if layout == trainer.config.layout:
            raise LayoutDoesNotFit("it is the layout in use. Name a field that changes.")
        if not trainer.plans_itself:
            raise LayoutDoesNotFit("the planner was made for the layout in use, so it stays. Pass no planner.")
        for one, when in ((trainer.config.layout, "in use"), (layout, "asked for")):
            if one.deepspeed is not None:
                raise LayoutDoesNotFit(
                    f"in the layout {when} DeepSpeed divides the state, which it does not give up while a job runs. Stop the "
                    "run, and resume it with the other layout.",
                    axis="sharding",
                )
        layout.check_world(trainer.workers)
        try:
            config = TrainConfig.model_validate(trainer.config.model_dump() | {"layout": layout.model_dump()})
        except ValidationError as error:
            raise LayoutDoesNotFit(_told(error)) from error
        check_layout(config)
        longest = min(config.data.context, max(int(corpus.lengths.max()) for corpus in trainer.corpora))
        if longest > layout.hdp * layout.capacity:
            raise LayoutDoesNotFit(
                f"the data has sequences of {longest:,} tokens, but {layout.hdp} HDP ranks with a capacity of "
                f"{layout.capacity:,} tokens hold {layout.hdp * layout.capacity:,}. Set capacity to at least "
                f"{-(-longest // layout.hdp):,}.",
                axis="capacity",
            )
        return config

    def _tell(self, before: Layout, move: Move, moved: Moved, seconds: float) -> None:
        text = (
            f"from {degrees_of(before)} to {degrees_of(move.layout)} in {seconds:.2f} s: {moved.total_bytes:,} bytes between "
            f"ranks, {move.reason}"
        )
        self._trainer.reporter.log(
            "layout moved",
            text,
            before=fields_of(before),
            layout=fields_of(move.layout),
            seconds=seconds,
            bytes_moved=moved.total_bytes,
        )


def _told(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    found = [(".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")) for one in error.errors()]
    return "; ".join(f"{place}: {text}" if place else text for place, text in found)


def _values(changes: Mapping[str, JsonValue] | Layout) -> dict[str, Any]:
    return fields_of(changes) if isinstance(changes, Layout) else dict(changes)


__all__ = ["Move", "Relayout"]

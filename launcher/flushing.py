"""``python -m evermesh.launcher.flushing RUN``: write the newest snapshot in the memory of nodes as a checkpoint.

It reads one JSON object from its standard input (``Order``), and prints one (``Flushed``). It needs no rank and no agent,
only keepers; it ends with the process that started it.
"""

import json
import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from evermesh.checkpoint.stores.places import Place
from evermesh.fault.snapshot.handshake import Address
from evermesh.fault.snapshot.reachable import Memories
from evermesh.fault.snapshot.remote import Keepers
from evermesh.launcher.death import end_with_parent
from evermesh.launcher.run_directory import Run
from evermesh.parallelism.errors import EvermeshError


class Order(BaseModel):
    """Whom to ask; the secret is told this way alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keepers: tuple[tuple[str, int], ...]
    launch: str
    secret: str
    """Hexadecimal digits."""
    newer_than: int
    """Step of the newest checkpoint; -1: there is none."""


class Flushed(BaseModel):
    """What became of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int | None = None
    """Of the checkpoint that was written; None: none was."""
    seconds: float = 0.0
    bytes_received: int = 0
    problems: tuple[str, ...] = ()
    """Why newer snapshots could not be written, and which keepers could not be asked."""


def flush(directory: Place, order: Order) -> Flushed:
    """Write the newest snapshot that is complete and can be read below ``directory``, if it is newer than what is there."""
    from evermesh.checkpoint.rewriting import rewrite

    began_s = time.monotonic()
    keepers = Keepers(tuple(Address(*one) for one in order.keepers), order.launch, bytes.fromhex(order.secret))
    with Memories(None, keepers) as memories:
        kept, problems = memories.look()
        for version in memories.complete(kept):
            if version.step <= order.newer_than:
                continue
            try:
                source = memories.source(kept, version)
                rewrite(source, directory, version.step, source.objects, source.description)
            except (EvermeshError, OSError) as error:
                problems.append(f"the snapshot of step {version.step}: {error}")
                continue
            seconds, received = time.monotonic() - began_s, memories.bytes_received
            return Flushed(step=version.step, seconds=seconds, bytes_received=received, problems=tuple(problems))
        return Flushed(problems=tuple(problems))


if __name__ == "__main__":
    end_with_parent()
    print(flush(Run(Path(sys.argv[1])).checkpoints, Order.model_validate(json.load(sys.stdin))).model_dump_json())

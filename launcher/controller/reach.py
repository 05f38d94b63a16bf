"""What the next ranks would find in the memory of all nodes, also of those whose agents are gone and where copies make up for
lost parts: asked in a thread while a job waits for nodes, so that nothing is rebuilt that is there."""

import threading
import time
from collections.abc import Sequence

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.messages import KeeperAt
from evermesh.parallelism.errors import EvermeshError

_PATIENCE_S = 10.0
"""A keeper that is stopped answers nobody."""


class Reach:
    """Asks at once. ``secret`` is that of the keepers of this launch."""

    def __init__(self, keepers: Sequence[KeeperAt], launch: str, secret: bytes) -> None:
        self.newest: Version | None = None
        """The newest snapshot that can be put together; None: there is none, or it is not known yet."""
        self._deadline_s = time.monotonic() + _PATIENCE_S
        self._thread = threading.Thread(target=self._ask, args=(tuple(keepers), launch, secret), daemon=True)
        self._thread.start()

    @property
    def is_known(self) -> bool:
        """Whether the answer is there, or took too long."""
        return not self._thread.is_alive() or time.monotonic() > self._deadline_s

    def _ask(self, keepers: Sequence[KeeperAt], launch: str, secret: bytes) -> None:
        # only now: it loads numpy, which a controller does without while all goes well
        from evermesh.fault.snapshot.handshake import Address
        from evermesh.fault.snapshot.reachable import Memories
        from evermesh.fault.snapshot.remote import Keepers

        addresses = tuple(Address(keeper.host, keeper.port) for keeper in keepers)
        try:
            with Memories(None, Keepers(addresses, launch, secret)) as memories:
                kept, _ = memories.look()
                self.newest = next(iter(memories.complete(kept)), None)
        except (EvermeshError, OSError, ValueError, LookupError) as error:  # as if nothing were there
            print(f"the memory of the nodes could not be looked at: {error}", flush=True)

"""What the keeper of a node last achieved in its stripe, in a file that its agent looks at."""

import json
from pathlib import Path
from typing import NamedTuple

_FILE = "standing"


class Standing(NamedTuple):
    """Of the newest snapshot that was to be protected."""

    epoch: int
    """Of the place in the stripe."""
    step: int
    is_protected: bool
    """Whether the other members can rebuild it."""
    text: str
    """Why it is not."""
    data_bytes: int = 0
    """That the node holds of it; 0: it is not protected, as with the next two."""
    coded_bytes: int = 0
    """Of these, that which parity is made of; the rest other members hold too."""
    parity_bytes: int = 0
    """That the node keeps for others."""
    seconds: float = 0.0
    """That it took."""

    def write(self, area: Path) -> None:
        """Leave it for the agent; memory that is full takes nothing, and loses nothing."""
        new = area / f"{_FILE}.new"
        try:
            new.write_text(json.dumps(self._asdict()))
            new.rename(area / _FILE)
        except OSError as error:
            print(f"{new}: {error}", flush=True)


def standing_in(area: Path) -> Standing | None:
    """What the keeper of an area has left; None: nothing."""
    try:
        return Standing(**json.loads((area / _FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None

"""Recording in the ranks of any script: told by the environment, started by the first process group."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evermesh.fault.recorder.groups import GroupWatch
from evermesh.fault.recorder.ring import RingSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from evermesh.fault.recorder.recorder import Recorder

VARIABLE = "EVERMESH_RINGS"
_FOLDER = Path(__file__).with_name("autostart")
_living: list[Any] = []


def environment_of(spec: RingSpec, inherited: Mapping[str, str]) -> dict[str, str]:
    """What the environment of a rank of a script must say for its collectives to be recorded."""
    values = {"path": str(spec.path), "node": spec.node, "owner": spec.owner, "generation": spec.generation}
    before = inherited.get("PYTHONPATH", "")
    return {VARIABLE: json.dumps(values), "PYTHONPATH": os.pathsep.join(filter(None, (str(_FOLDER), before)))}


def arm() -> None:
    """Start the recorder when the first process group is made."""
    _living.append(_Armed())


class _Armed:
    def __init__(self) -> None:
        self._told = json.loads(os.environ.pop(VARIABLE))  # not for the children of this process
        self._is_armed = True
        self._watch = GroupWatch(self._start)

    def _start(self, group: "ProcessGroup", ranks: tuple[int, ...]) -> None:
        if not self._is_armed:
            return
        self._is_armed = False
        self._watch.restore()
        try:
            _living.append(self._record(len(ranks)))
        except Exception as error:  # noqa: BLE001  the boundary: a script runs whether or not it is recorded
            print(f"evermesh: collectives are not recorded: {error}", file=sys.stderr)

    def _record(self, world_size: int) -> "Recorder":
        from evermesh.fault.recorder.recorder import Recorder

        rank = int(os.environ["RANK"])
        path, generation = Path(self._told["path"]), int(self._told["generation"])
        recorder = Recorder(RingSpec(path, rank, world_size, generation, self._told["node"], self._told["owner"]))
        _count_steps(recorder)
        return recorder


def _count_steps(recorder: "Recorder") -> None:
    """The step of a script: how often the optimizer that stepped first has stepped, and the one under way."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    first: list[int] = []
    steps = 1
    recorder.note_moment(steps, "train")

    def count(optimizer: Any, *_: Any) -> None:
        nonlocal steps
        if not first:
            first.append(id(optimizer))
        if id(optimizer) == first[0]:
            steps += 1
            recorder.note_moment(steps, "train")

    register_optimizer_step_post_hook(count)

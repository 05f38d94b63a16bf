"""Where the faults that a run was given meet the tensors of a rank."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from evermesh.runtime.parameter_set import ParameterSet

if TYPE_CHECKING:
    from evermesh.fault.injection.hook import Injector
    from evermesh.runtime.engine import Engine

_PARAMETER = "parameter."


def attach(faults: "Injector", engine: "Engine") -> None:
    """Let ``faults`` see what ``engine`` holds."""
    engine.runner.faults = faults
    faults.attach(lambda: _owned_parameters(engine), lambda: _own_gradients(engine.built.sets))


def _owned_parameters(engine: "Engine") -> dict[str, list[Tensor]]:
    """The live parameters that this rank owns, in the optimizer's precision."""
    owned = engine.optimizer.owned_state().items()
    return {name.removeprefix(_PARAMETER): regions for name, regions in owned if name.startswith(_PARAMETER)}


def _own_gradients(sets: Iterable[ParameterSet]) -> dict[str, list[Tensor]]:
    """The gradients of this rank's batch; where only its part of their sum is kept, that, by the first parameter of it."""
    found: dict[str, list[Tensor]] = {}
    for parameters in sets:
        entries = parameters.flat.entries
        if parameters.keeps_gradients:
            found |= {entry.name: [parameters.gradients[entry.start : entry.stop]] for entry in entries}
        else:
            found[f"{entries[0].name} and what follows"] = [parameters.gradients]
    return found

"""How many bytes the parameter sets of a rank hold, at any time of a step."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from evermesh.runtime.optimizer import ShardedOptimizer
from evermesh.runtime.parameter_set import ParameterSet


class WatchedSets:
    """Notes what the sets of a model hold together, whenever that changes."""

    def __init__(self, sets: Sequence[ParameterSet]) -> None:
        self.sets, self.most = sets, Counter[str]()
        """Of every kind, at any time."""
        self.most_together = 0
        for parameters in sets:
            for name in ("start_gather", "free", "reduce", "sum_gradients"):
                self._watch(parameters, name)

    def held(self) -> int:
        """Bytes of all kinds now."""
        return sum(sum(parameters.held_bytes.values()) for parameters in self.sets)

    def _watch(self, parameters: ParameterSet, name: str) -> None:
        called = getattr(parameters, name)

        def watched(*arguments: Any) -> Any:
            self._look()
            result = called(*arguments)
            self._look()
            return result

        setattr(parameters, name, watched)

    def _look(self) -> None:
        now: Counter[str] = Counter()
        for parameters in self.sets:
            now.update(parameters.held_bytes)
        self.most |= now
        self.most_together = max(self.most_together, now.total())


def state_bytes(optimizer: ShardedOptimizer) -> int:
    """Bytes of moments, and of master parameters that are not the parameters themselves."""
    total = 0
    for shard in optimizer.shards:
        is_apart = shard.master.data_ptr() != shard.set.owned_values.data_ptr()
        total += shard.exp_avg.nbytes + shard.exp_avg_sq.nbytes + (shard.master.nbytes if is_apart else 0)
    return total

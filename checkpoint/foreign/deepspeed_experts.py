"""Which experts the data-parallel ranks of DeepSpeed hold. Imports no torch.

Every rank calls its experts 0, 1, ...; files of experts, and we, call them by their number among all. The partitions of a
group of experts are on the ranks that hold the same ones. Format: as found in files of version 0.19.8.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.foreign.deepspeed_model import AGAIN, ModelStates
from evermesh.checkpoint.stores.places import Place

_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")


class Experts:
    """How one model's experts are spread over ``ranks`` data-parallel ranks."""

    def __init__(self, path: Place, model: ModelStates, ranks: int) -> None:
        if model.first.get("ds_autoep_layers"):
            way_out = "Convert it with ds_to_universal."
            raise ForeignUnusable(path, "its experts were made by automatic expert parallelism", way_out)
        config = model.first.get("ds_config")
        self.path, self.ranks = path, ranks
        self.data_first = isinstance(config, dict) and bool(config.get("use_data_before_expert_parallelism"))
        self.num_local: dict[str, int] = {}
        for match in (_EXPERT.fullmatch(name) for group in model.shapes for name in group):
            if match:
                self.num_local[match[1]] = max(self.num_local.get(match[1], 0), int(match[2]) + 1)

    def holders(self, group: Mapping[str, Any], partitions: Any) -> int:
        """Different sets of experts in a group of parameters that each of ``partitions`` ranks has a part of."""
        if type(partitions) is not int or not 0 < partitions <= self.ranks or self.ranks % partitions:
            fact = f"{str(partitions)[:20]} of its {self.ranks} ranks share a group of parameters"
            raise ForeignUnusable(self.path, fact, AGAIN)
        if partitions < self.ranks and not group.get("moe"):
            fact = f"a group of parameters without experts is on {partitions} of {self.ranks} ranks"
            raise ForeignUnusable(self.path, fact, "Save it with data parallelism only, or with experts.")
        return self.ranks // partitions

    def of_rank(self, rank: int, holders: int) -> int:
        """Which of the sets of experts a rank holds."""
        return rank // (self.ranks // holders) if self.data_first else rank % holders

    def name(self, name: str, holder: int, holders: int) -> str:
        """What a parameter is called among all, given the set of experts that a rank holds."""
        match = _EXPERT.fullmatch(name)
        if match is None or holders == 1:
            return name
        return f"{match[1]}{holder * self.num_local[match[1]] + int(match[2])}{match[3]}"

    def names(self, name: str, holders: int) -> Sequence[str]:
        """What a parameter is called among all, on all ranks."""
        return list(dict.fromkeys(self.name(name, holder, holders) for holder in range(holders)))

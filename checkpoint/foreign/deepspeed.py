"""Checkpoints as DeepSpeed writes them with ZeRO 1, 2 and 3, on any axes: data, tensor, pipeline, expert. Imports no torch.

Tensors are called ``parameter.NAME`` (the float32 masters of trained weights, frozen weights as they are),
``buffer.NAME``, and ``STATE.NAME`` for whatever the optimizer keeps per element, such as ``exp_avg.NAME``; tensors in the
client's state ``client.NAME``. Names are those of the whole model: layers of a pipeline and experts have their number
among all. Format: as found in files of version 0.19.8.
"""

import itertools
from typing import Any

from pydantic import JsonValue

from evermesh.checkpoint.errors import DAMAGE, ForeignUnusable
from evermesh.checkpoint.foreign.deepspeed_files import find_files
from evermesh.checkpoint.foreign.deepspeed_grid import Grid
from evermesh.checkpoint.foreign.deepspeed_model import AGAIN, PARAMETER, SCALER, read
from evermesh.checkpoint.foreign.deepspeed_partitions import Partitions
from evermesh.checkpoint.foreign.fragments import Fragment, whole
from evermesh.checkpoint.foreign.values import Values
from evermesh.checkpoint.format import StoredTensor
from evermesh.checkpoint.sources import Source, plain_files
from evermesh.checkpoint.stores.places import Place


def open_deepspeed(path: Place) -> Source:
    """Index the folder of one tag.

    Raises:
        ForeignUnusable: files are missing or damaged, of another layout, or were not saved together.
    """
    files = find_files(path)
    try:
        values = Values(path)
        shards = [[read(file)["optimizer_state_dict"] for file in of_rank] for of_rank in files.optimizers]
        return _Reader(Grid(path, files, values), shards).source()
    except DAMAGE as error:
        if isinstance(error, ForeignUnusable):
            raise
        fact = f"its files are not as DeepSpeed writes them ({type(error).__name__}: {str(error)[:100]})"
        raise ForeignUnusable(path, fact, AGAIN) from error


class _Reader:
    """The contents of all files of a tag."""

    def __init__(self, grid: Grid, shards: list[list[dict[str, Any]]]) -> None:
        self.path, self.grid, self.values, self.shards = grid.path, grid, grid.values, shards
        of_rank = iter(shards)
        self.stages = [[Partitions(self.path, model, next(of_rank)) for model in stage] for stage in grid.stages]

    def source(self) -> Source:
        tensors = self._trained()
        names = {name for stage in self.stages for name in stage[0].shapes()}
        kinds = {key.removesuffix(name) for name in names for key in tensors if key.endswith(f".{name}")}
        tensors |= {PARAMETER + name: tensor for name, tensor in self.grid.frozen(names).items()}
        tensors = self.grid.with_aliases(tensors, kinds) | self.grid.buffers()
        self.grid.rules.check_all_used()
        objects = self._objects()
        tensors |= {place: whole(self.path, place, tensor) for place, tensor in self.values.tensors.items()}
        return Source(
            self.path,
            "deepspeed",
            tensors,
            plain_files(self.path, tensors),
            objects,
            self.grid.description(),
            self.grid.step,
            sum(map(len, self.shards)),
            tuple(self.values.left_out),
        )

    def _trained(self) -> dict[str, StoredTensor]:
        """Masters and states. A parameter that several stages have is tied; the first one's is read."""
        found: dict[str, StoredTensor] = {}
        for stage in self.stages:
            shapes = [partitions.shapes() for partitions in stage]
            fragments: dict[tuple[str, str], list[list[Fragment]]] = {}
            for rank, partitions in enumerate(stage):
                for kind, name, fragment in partitions.fragments():
                    fragments.setdefault((kind, name), [[] for _ in stage])[rank].append(fragment)
            for (kind, name), of_ranks in fragments.items():
                if kind + name not in found:
                    parts = [(of[name], pieces) for of, pieces in zip(shapes, of_ranks, strict=True)]
                    found[kind + name] = self.grid.assembled(kind, name, parts)
        return found

    def _objects(self) -> dict[str, JsonValue]:
        shard = self.shards[0][0]
        return self.grid.objects() | {
            "groups": [self.values.json(group, f"groups[{index}]") for index, group in enumerate(self._groups())],
            "scaler": self.values.objects({key: shard[key] for key in SCALER if key in shard}, ""),
            "zero_stage": self.stages[0][0].stage,
        }

    def _groups(self) -> list[dict[str, Any]]:
        """Groups of all stages: those that have the same place and settings are one."""
        by_stage = [stage[0].groups() for stage in self.stages]
        for rank, partitions in enumerate(itertools.chain.from_iterable(self.stages)):
            groups = partitions.groups()
            steps = {str(group["numbers"].get("step")) for group in (*groups, *by_stage[0]) if group["numbers"]}
            if len(steps) > 1:
                raise ForeignUnusable(
                    self.path, f"model-parallel ranks 0 and {rank} are of steps {sorted(steps)}", AGAIN
                )
        found: list[dict[str, Any]] = by_stage[0]
        for stage in by_stage[1:]:
            for index, group in enumerate(stage):
                same = index < len(by_stage[0]) and all(found[index][k] == group[k] for k in ("settings", "numbers"))
                if not same:
                    found.append(group)
                    continue
                known = found[index]["names"]
                found[index] = found[index] | {"names": [*known, *(n for n in group["names"] if n not in known)]}
        return found

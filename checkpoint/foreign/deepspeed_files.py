"""Which files a folder of DeepSpeed has, by the ranks that wrote them. Imports no torch.

``mp_rank`` counts the ranks that share a model, pipeline stages first: rank = stage x tensor-parallel ranks + tensor-parallel
rank. What the library calls ``pp_rank`` in the names of files is the data-parallel rank. Layers of a pipeline module have
files of their own, and so has every expert.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.foreign.deepspeed_model import AGAIN
from evermesh.checkpoint.stores.looking import files_in
from evermesh.checkpoint.stores.places import Place

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)-(?:model_(\d+)-)?model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
_OTHER = re.compile(r"(layer_|expert_|expp_).*\.pt")
_ByRank = dict[int, dict[int, Place]]


@dataclass(frozen=True, slots=True)
class Files:
    """Paths of one folder."""

    models: list[list[Place]]
    """By model-parallel and data-parallel rank."""
    optimizers: list[list[Place]]
    layers: list[dict[int, Place]]
    """By tensor-parallel rank and index of the layer; empty if no pipeline module wrote them."""
    experts: dict[tuple[int, int], Place]
    """By MoE layer and expert."""


def find_files(path: Place, *, universal: bool = False) -> Files:
    """The files in ``path``; a ``universal`` folder has copies of those of the model only.

    Raises:
        ForeignUnusable: some are missing, or are of a kind that is not known.
    """
    models, optimizers, layers = _ByRank(), _ByRank(), _ByRank()
    experts: dict[tuple[int, int], Place] = {}
    for file in files_in(path):
        if match := _MODEL.fullmatch(file.name):
            # where both forms are there, as in what this project writes, the first one has all weights
            models.setdefault(int(match[2]), {}).setdefault(int(match[1] or 0), file)
        elif match := _OPTIMIZER.fullmatch(file.name):
            optimizers.setdefault(int(match[2]), {})[int(match[1])] = file
        elif match := _LAYER.fullmatch(file.name):
            layers.setdefault(int(match[2] or 0), {})[int(match[1])] = file
        elif match := _EXPERT.fullmatch(file.name):
            experts[int(match[1]), int(match[2])] = file
        elif _OTHER.fullmatch(file.name):
            way_out = "Experts without ZeRO, and of several tensor-parallel ranks, are not: save with ZeRO 1 or 2."
            raise ForeignUnusable(path, f"it has {file.name}, which this version does not read", way_out)
    of_models = list(_grid(path, models, "model"))
    of_optimizers = [] if universal else list(_grid(path, optimizers, "optimizer"))
    if of_optimizers and len(of_optimizers) != len(of_models):
        fact = f"it has files of the model of {len(of_models)} ranks and of the optimizer of {len(of_optimizers)}"
        raise ForeignUnusable(path, fact, AGAIN)
    if sorted(layers) != list(range(len(layers))):
        raise ForeignUnusable(path, f"it has files of layers of tensor-parallel ranks {sorted(layers)} only", AGAIN)
    return Files(of_models, of_optimizers, [layers[rank] for rank in sorted(layers)], experts)


def _grid(path: Place, found: _ByRank, what: str) -> Iterator[list[Place]]:
    if not found:
        without = ", as without ZeRO" if what == "optimizer" else ""
        raise ForeignUnusable(path, f"it has no files of the {what}{without}", AGAIN)
    ranks = {"model-parallel ranks": list(found)} | {f"ranks of {rank}": list(found[rank]) for rank in found}
    for of, there in ranks.items():
        if sorted(there) != list(range(len(there))):
            fact = f"of {of.partition(' of ')[0]} 0 to {max(there)} some lack their files of the {what}"
            raise ForeignUnusable(path, fact, AGAIN)
    for rank in sorted(found):
        if len(found[rank]) != len(found[0]):
            fact = f"model-parallel ranks 0 and {rank} have {len(found[0])} and {len(found[rank])} files of the {what}"
            raise ForeignUnusable(path, fact, AGAIN)
        yield [found[rank][index] for index in sorted(found[rank])]


def degrees(path: Place, first: dict[str, Any], files: Files) -> tuple[int, int]:
    """Pipeline stages and tensor-parallel ranks; ``first`` is the file of the model of the first rank.

    Files of versions before 0.19 tell it by their layers only. Raises ``ForeignUnusable``.
    """
    ranks = len(files.models)
    said = first.get("checkpoint_parallel_dimensions")
    tensor: Any = len(files.layers) or ranks
    if isinstance(said, dict):
        tensor = said.get("tp_degree")
    if type(tensor) is not int or tensor < 1 or ranks % tensor:
        raise ForeignUnusable(path, f"its {ranks} model-parallel ranks are groups of {str(tensor)[:20]}", AGAIN)
    if files.layers and len(files.layers) != tensor:
        fact = f"it has files of layers of {len(files.layers)} tensor-parallel ranks of {tensor}"
        raise ForeignUnusable(path, fact, AGAIN)
    if files.experts and ranks > 1:
        way_out = "Save it with expert and data parallelism only."
        raise ForeignUnusable(path, f"it has experts and {ranks} model-parallel ranks, which is not read", way_out)
    return ranks // tensor, tensor

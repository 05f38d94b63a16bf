"""A new run that goes on with the weights and moments of another library's checkpoint, read where they lie."""

from evermesh import checkpoint
from evermesh.checkpoint.naming import Naming
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.sources import with_prefixes
from evermesh.runtime.config import AdoptConfig
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.families import written_form
from evermesh.runtime.state import TrainingState
from evermesh.runtime.weights import PARAMETER


def adopt_checkpoint(config: AdoptConfig, model: ModelConfig, state: TrainingState) -> checkpoint.LoadResult:
    """Take over what ``config`` names, after the model was built and before the first step. Collective.

    Raises:
        ForeignUnusable: it cannot be read, or does not say how many updates were made.
        UnsupportedModel: no Hugging Face family has all options of ``model``, and names of one were asked for.
        CheckpointMismatch, CheckpointCorrupt: see ``evermesh.checkpoint.load``.
    """
    names = _hugging_face_names(model, state.registry.shard_map) if config.names == "hugging_face" else None
    return state.adopt(checkpoint.open_checkpoint(config.path), names, config.updates)


def _hugging_face_names(model: ModelConfig, shards: ShardMap) -> Naming:
    """How the weights of ``model`` are called there, and the moments of each, which have the same names."""
    whole = {name.removeprefix(PARAMETER): t.shape for name, t in shards.tensors.items() if name.startswith(PARAMETER)}
    kinds = tuple(sorted({name[: name.index(".") + 1] for name in shards.tensors}))
    return with_prefixes(written_form(model, whole)[1], kinds, kinds)


__all__ = ["adopt_checkpoint"]

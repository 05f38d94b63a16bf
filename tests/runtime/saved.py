"""What the newest checkpoint of a run holds."""

from pathlib import Path

import torch
from torch import Tensor

from evermesh import checkpoint
from evermesh.checkpoint.directory import read_manifest


def newest_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors, whole, of the newest checkpoint in a folder of checkpoints."""
    path = checkpoint.latest(directory)
    assert path is not None
    manifest = read_manifest(path)
    tensors = {name: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for name, t in manifest.tensors.items()}
    checkpoint.load(path, {name: (checkpoint.Interval(0, t.numel()), t) for name, t in tensors.items()})
    return tensors

"""Saving a model of transformers: at once, or while its owner trains on."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from evermesh import checkpoint
from evermesh.checkpoint.background.saver import BackgroundSaver
from evermesh.checkpoint.retention import Retention, as_retention
from evermesh.checkpoint.stores.places import Place
from evermesh.runtime.own_model.state import SavedState
from evermesh.runtime.process_group import Groups


class Destination(NamedTuple):
    """Where checkpoints go, and which of them stay."""

    directory: Place
    keep: int | Retention | None


class ModelSaves:
    """The checkpoints of one model. Every method is collective."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._saver: BackgroundSaver | None = None
        self._place: Destination | None = None
        self._known: dict[str, _Identity] = {}
        """Of the tensors that the saver copies."""

    def save(self, place: Destination, step: int, state: SavedState) -> Place:
        """Write a checkpoint and return its path when it is durable.

        Raises:
            CheckpointNotSaved: on every rank, if any of them failed with it or with the one before.
        """
        self.finish()
        moment = self._groups.moment
        phase, moment.phase = moment.phase, "checkpoint"
        path = checkpoint.save(
            place.directory,
            step,
            state.shard_map,
            state.tensors,
            state.objects,
            communicator=self._groups.host,
            keep=place.keep,
        )
        moment.phase = phase
        return path

    def begin(self, place: Destination, step: int, state: SavedState) -> Place:
        """Copy the state, and return the path where it will be while it is being written.

        Raises:
            CheckpointNotSaved: on every rank, if the one before has failed; this one was not begun.
            HostMemoryShort: on every rank, if any has no room for its copy.
        """
        moment = self._groups.moment
        phase, moment.phase = moment.phase, "checkpoint"
        saver = self._saver_of(place, state)
        saver.begin(step, state.objects)
        moment.phase = phase
        return saver.path_of(step)

    def finish(self) -> None:
        """Return when nothing is being written any more, and let go of the copy.

        Raises:
            CheckpointNotSaved: on every rank, if any of them failed.
        """
        saver, self._saver = self._saver, None
        if saver is not None:
            with saver:
                saver.finish()

    def _saver_of(self, place: Destination, state: SavedState) -> BackgroundSaver:
        """The one there is, unless the optimizer has made other tensors meanwhile, as it does in its first step."""
        known = {name: _identity(tensor) for name, tensor in state.tensors.items()}
        if self._saver is None or self._is_other(place, known):
            self.finish()
            self._saver = BackgroundSaver(
                place.directory,
                state.shard_map,
                state.tensors,
                communicator=self._groups.host,
                keep=as_retention(place.keep),
            )
            self._place, self._known = place, known
        return self._saver

    def _is_other(self, place: Destination, known: Mapping[str, "_Identity"]) -> bool:
        """Whether any rank would save elsewhere or other tensors; the same answer on all."""
        differs = torch.tensor([place != self._place or known != self._known], dtype=torch.int64)
        self._groups.host.all_reduce(differs, "checkpoint", maximum=True)
        return bool(differs)


class _Identity(NamedTuple):
    """Of the memory of a tensor."""

    address: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]


def _identity(tensor: Tensor) -> _Identity:
    return _Identity(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())

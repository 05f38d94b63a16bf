"""What a new run begins with that is not of its own seed: weights of another project, a checkpoint of another library."""

import gc
import time
from typing import TYPE_CHECKING

from evermesh.checkpoint.stores.places import Place
from evermesh.runtime.adopting import adopt_checkpoint
from evermesh.runtime.config import AdoptConfig
from evermesh.runtime.model.families import unused_settings
from evermesh.runtime.weights import load_initial_weights

if TYPE_CHECKING:
    from evermesh.runtime.trainer import Trainer


def begin(trainer: "Trainer", *, is_initialized: bool) -> None:
    """Begin a run of which nothing was found in memory, and nothing is in storage. Collective.

    First values take long, so they were not computed (``is_initialized``) where something was to be found; and what a
    damaged snapshot has left in the state must not stay. Then all is built once more.
    """
    groups = trainer.groups
    if not is_initialized or trainer.snapshots.is_touched:
        trainer.dismantle()
        gc.collect()
        trainer.build(trainer.config, initialize=True, before=groups)
        groups.leave(trainer.groups)
    take_first_weights(trainer)


def take_first_weights(trainer: "Trainer") -> None:
    """Give ``trainer`` what its configuration says that it starts from, and log that; nothing where it says nothing.
    Collective.

    Raises:
        UnsupportedModel, WeightsUnusable, ForeignUnusable, CheckpointMismatch, CheckpointCorrupt: see ``Trainer``.
    """
    config = trainer.config
    if config.init_from is not None:
        _start_from(trainer, config.init_from)
    elif config.adopt is not None:
        _adopt(trainer, config.adopt)


def _start_from(trainer: "Trainer", directory: Place) -> None:
    started_s, log = time.monotonic(), trainer.reporter.log
    model = trainer.config.model
    loaded = load_initial_weights(directory, model, trainer.optimizer, trainer.shards, trainer.groups.world)
    if loaded.router_biases:
        trainer.progress.router_biases = loaded.router_biases
        trainer.experts.tell_routers()
    read = loaded.read
    text = f"from {directory}, in {' and '.join(read.dtypes)}, {read.bytes_read:,} bytes by rank 0"
    log("weights", text, load_s=time.monotonic() - started_s)
    for name, value in unused_settings(directory).items():
        log("weights", f"{name} {value} of {directory} is not used; what balances experts is train.model.moe")


def _adopt(trainer: "Trainer", config: AdoptConfig) -> None:
    started_s = time.monotonic()
    read = adopt_checkpoint(config, trainer.config.model, trainer.state)
    text = f"from {config.path}, after {trainer.progress.updates:,} updates, {read.bytes_read:,} bytes by rank 0"
    trainer.reporter.log("weights", text, load_s=time.monotonic() - started_s, bytes_read=read.bytes_read)

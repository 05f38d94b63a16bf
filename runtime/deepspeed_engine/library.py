"""Starts the library on the group that is there, and taps what it sends."""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.links import Operation
from evermesh.runtime.config import TrainConfig

Sum = Literal["gradients", "norms"]
_TAPPED: dict[str, tuple[Operation, int, str]] = {
    "all_reduce": ("all_reduce", 0, "tensor"),
    "all_gather": ("all_gather", 1, "tensor"),
    "all_gather_into_tensor": ("all_gather", 1, "input_tensor"),
    "all_gather_coalesced": ("all_gather", 1, "input_tensors"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input_tensor"),
}
"""Collectives of its backend that a step can issue: what each is, and which argument is the payload, by place and name."""


class LibraryTap:
    """Sends a record of every collective that DeepSpeed issues in a step to the listeners of ``hdp``."""

    def __init__(self, hdp: Communicator) -> None:
        self.hdp = hdp
        self.sums: Sum = "gradients"
        """What an ``all_reduce`` is for, at the moment."""

    def install(self, backend: Any) -> None:
        """Put itself between the library and its communication ``backend``, in the place of an earlier one."""
        for name in _TAPPED:
            issue = getattr(backend, name)
            setattr(backend, name, self._tapped(name, getattr(issue, "untapped", issue)))

    def _tapped(self, name: str, issue: Callable[..., Any]) -> Callable[..., Any]:
        operation, place, payload = _TAPPED[name]

        def tapped(*arguments: Any, **options: Any) -> Any:
            sent = arguments[place] if len(arguments) > place else options[payload]
            site = self.sums if operation == "all_reduce" else _CALL_SITES[operation]
            for tensor in sent if isinstance(sent, list) else [sent]:
                self.hdp.tell(operation, tensor, site)
            return issue(*arguments, **options)

        tapped.untapped = issue  # type: ignore[attr-defined]
        return tapped


_CALL_SITES: dict[Operation, str] = {"all_gather": "parameters", "reduce_scatter": "gradients"}


def start_library(config: TrainConfig, hdp: Communicator) -> LibraryTap:
    """Let DeepSpeed use the default group, which is made if this process is alone. Collective.

    Call it before anything else imports the library.
    """
    os.environ["DS_ACCELERATOR"] = config.device.kind  # else it takes a GPU that it finds, whatever the configuration
    os.environ.setdefault("LOCAL_RANK", "0")  # it refuses to run without; the device we use without, too
    import deepspeed

    # it would compile an operator for one node's shared memory, in a minute, and needs a compiler for it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch tells at every call that these have new names
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    timeout = timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        backend = "nccl" if config.device.kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(dist_init_required=False, timeout=timeout)
    # a group of its own, as it would make it, but one that does not wait half an hour for a dead rank
    deepspeed.utils.groups._WORLD_GROUP = dist.new_group(timeout=timeout)
    tap = LibraryTap(hdp)
    tap.install(deepspeed.comm.comm.cdb)
    return tap

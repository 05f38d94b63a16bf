"""The same bits from the same run: what torch and its libraries are told, and a digest by which runs are compared."""

import hashlib
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evermesh.parallelism.collectives import Communicator

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it matrix products on several streams share scratch memory
    "NCCL_ALGO": "Ring",  # one order of additions, whatever the size of the message and the load of the links
}
"""What CUDA libraries must find when they are first used."""
_DIGEST_BYTES = 16


def prepare_environment() -> dict[str, str]:
    """Set what is missing of ``ENVIRONMENT``; what a user has set stays. Returns the values that count now.

    A worker calls this before it joins a process group or touches a GPU.
    """
    return {name: os.environ.setdefault(name, value) for name, value in ENVIRONMENT.items()}


def use_deterministic_algorithms(seed: int) -> None:
    """Have this process use only algorithms that give the same bits every time; torch raises where it has none.

    Holds for the process, from now on.
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # the fastest of several algorithms is not always the same one
    torch.manual_seed(seed)


def parameters_digest(owned: Mapping[str, Sequence[Tensor]], communicator: Communicator) -> str:
    """Digest of the parameters among what all ranks own, in the optimizer's precision. Collective: 16 bytes of every rank.

    Runs with the same layout have the same digest if and only if their parameters are equal, bit for bit. Another
    layout adds in another order, and divides the parameters otherwise.
    """
    own = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, regions in owned.items():
        if name.startswith("parameter."):
            own.update(name.encode())
            for region in regions:
                own.update(region.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    digests = torch.empty(communicator.size * _DIGEST_BYTES, dtype=torch.uint8)
    communicator.all_gather(digests, torch.frombuffer(bytearray(own.digest()), dtype=torch.uint8), "digest")
    return hashlib.blake2b(digests.numpy().tobytes(), digest_size=_DIGEST_BYTES).hexdigest()

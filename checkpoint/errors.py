"""The errors of this room.

EvermeshError
├── ShardMapInvalid        (ValueError)         regions leave a gap, overlap or reach outside their tensor
├── CheckpointNotSaved     (OSError)            a save failed on some rank; all ranks raise it
├── HostMemoryShort        (OSError)            the copy of the state that is written in the background has no room
├── StoreUnusable          (OSError)            an object store does not do what it is asked
│   └── StoreRefused       (PermissionError)    it does not permit it, or does not know who asks
├── ParityUnusable         (ValueError)         parity cannot protect the files of a checkpoint
├── CheckpointNotFound     (FileNotFoundError)  there is no complete checkpoint at a path
├── CheckpointCorrupt      (ValueError)         bytes are not those that were saved
├── ForeignUnusable        (ValueError)         a checkpoint of another project cannot be read
│   └── WeightsUnusable                         its weights cannot, or ours not be written for it
├── CheckpointMismatch     (ValueError)         the checkpoint and the caller disagree about tensors
└── RegistryMismatch       (ValueError)         the checkpoint and the state registry disagree about entries
"""

from collections.abc import Sequence

from evermesh.checkpoint.stores.places import ObjectPath, Place
from evermesh.parallelism.errors import EvermeshError

DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What Python raises where bytes are not what their format says."""


class ShardMapInvalid(EvermeshError, ValueError):
    """Regions leave a gap, overlap or reach outside their tensor; the message names the tensor and the place."""


class CheckpointNotSaved(EvermeshError, OSError):
    """A save failed. No temporary directory is left and the checkpoints that existed before are untouched."""

    def __init__(
        self,
        directory: Place,
        step: int,
        rank: int,
        cause: str,
        error: int | None,
        bytes_needed: int,
        bytes_free: int | None,
        newest: str | None = None,
    ) -> None:
        free = "" if bytes_free is None else f" and {bytes_free:,} are free there"
        older = f"; the newest is {newest}" if newest is not None else ""
        super().__init__(
            f"the checkpoint of step {step} was not saved in {directory}: rank {rank}: {cause}. It needs "
            f"{bytes_needed:,} bytes{free}. Remove what caused it and save again; earlier checkpoints are untouched{older}."
        )
        self.directory, self.step, self.rank, self.cause = directory, step, rank, cause
        self.errno = error
        self.bytes_needed, self.bytes_free = bytes_needed, bytes_free
        self.newest = newest
        """Name of the newest checkpoint, where it is known."""


class HostMemoryShort(EvermeshError, OSError):
    """There is no room for the copy of a rank's state that another process writes. Nothing was written or allocated."""

    def __init__(self, bytes_needed: int, bytes_free: int, fact: str) -> None:
        super().__init__(
            f"saving in the background needs {bytes_needed:,} bytes of shared memory on this rank, {bytes_free:,} are "
            f"free: {fact}. Give the job more (docker run --shm-size, a volume of medium Memory on /dev/shm in "
            f"Kubernetes), use more ranks, or set train.checkpoint.asynchronous to off."
        )
        self.bytes_needed, self.bytes_free, self.fact = bytes_needed, bytes_free, fact

    @classmethod
    def of_rank(cls, rank: int, cause: str) -> "HostMemoryShort":
        """What the other ranks raise: the cause is the error of ``rank`` as text."""
        error = cls(0, 0, cause)
        error.args = (f"rank {rank}: {cause.removeprefix(cls.__name__ + ': ')}",)
        return error


class StoreUnusable(EvermeshError, OSError):
    """An object store does not do what it is asked, and was asked often enough. ``file`` names store and key."""

    def __init__(
        self, file: ObjectPath, what: str, cause: str, attempts: int, seconds: float, way_out: str | None = None
    ) -> None:
        times = "once" if attempts == 1 else f"{attempts} times"
        super().__init__(
            f"{what} {file} failed, tried {times} in {seconds:.1f} s: {cause}. {way_out or self._way_out(file)}"
        )
        self.file, self.cause, self.attempts, self.seconds = file, cause, attempts, seconds

    @staticmethod
    def _way_out(file: ObjectPath) -> str:
        return (
            f"Check that the {file.protocol} endpoint can be reached from here (AWS_ENDPOINT_URL, AWS_REGION, proxies), "
            "then repeat; checkpoints that were complete stay as they are."
        )


class StoreRefused(StoreUnusable, PermissionError):
    """A store does not permit a request, or does not know who asks."""

    @staticmethod
    def _way_out(file: ObjectPath) -> str:
        return (
            f"Give this machine credentials that may list, read, write and delete below {file.protocol}://{file.bucket} "
            f"(AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role of the machine)."
        )


class ParityUnusable(EvermeshError, ValueError):
    """Parity is asked for where it cannot protect the files of a checkpoint. Nothing was written."""


class CheckpointNotFound(EvermeshError, FileNotFoundError):
    """There is no complete checkpoint at a path."""

    def __init__(self, path: Place, fact: str) -> None:
        super().__init__(f"no checkpoint at {path}: {fact}. Name a step directory of `evermesh checkpoint ls`.")
        self.path, self.fact = path, fact


class CheckpointCorrupt(EvermeshError, ValueError):
    """Bytes of a file are not those that were saved. ``chunk`` is None when not one chunk but the file is wrong;
    ``elements`` says as text which elements of which tensors the chunk holds."""

    def __init__(
        self,
        file: Place,
        fact: str,
        *,
        chunk: int | None = None,
        start: int = 0,
        stop: int = 0,
        tensors: Sequence[str] = (),
        elements: Sequence[str] = (),
    ) -> None:
        more = f" and {len(elements) - 3} more" if len(elements) > 3 else ""
        held = f" They hold {'; '.join(elements[:3])}{more}." if elements else ""
        place = f"chunk {chunk}, bytes {start:,} to {stop:,}: " if chunk is not None else ""
        super().__init__(f"{file}: {place}{fact}.{held} Load an earlier checkpoint, or restore the file from a copy.")
        self.file, self.fact, self.chunk, self.start, self.stop = file, fact, chunk, start, stop
        self.tensors, self.elements = tuple(tensors), tuple(elements)


class ForeignUnusable(EvermeshError, ValueError):
    """A checkpoint of another project cannot be read. Nothing of it was executed."""

    def __init__(self, path: Place, fact: str, way_out: str) -> None:
        super().__init__(f"{path}: {fact}. {way_out}")
        self.path, self.fact, self.way_out = path, fact, way_out


class WeightsUnusable(ForeignUnusable):
    """Weights of another project cannot be read into this model, or not be written for it."""


class CheckpointMismatch(EvermeshError, ValueError):
    """The checkpoint and the caller disagree about tensors; the message lists all of them. Nothing was read."""

    def __init__(self, path: Place, differences: Sequence[str]) -> None:
        lines = "".join(f"\n  {difference}" for difference in differences)
        super().__init__(
            f"{path} does not fit what is to be loaded, {len(differences)} differences:{lines}\n"
            f"Load it into the model it was saved from, or pass strict=False to leave extra tensors unread."
        )
        self.path, self.differences = path, tuple(differences)


class RegistryMismatch(EvermeshError, ValueError):
    """The checkpoint and the state registry disagree about entries; the message names them. Nothing was restored."""

"""Requests that are tried again: with growing, jittered pauses, until a deadline.

Full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog 2015): a pause is drawn evenly from zero to a
limit that doubles, so that ranks which failed together do not come back together.
"""

import errno
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from evermesh.checkpoint.errors import StoreRefused, StoreUnusable
from evermesh.checkpoint.stores.places import ObjectPath

T = TypeVar("T")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_TRANSIENT_CODES = frozenset(
    {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "OperationAborted", "SlowDown"}
)
_TRANSIENT_STATUS = frozenset({408, 409, 425, 429})
_REFUSALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError")
"""Errors of botocore that are raised before anything is sent; by name, because not every store has that library."""
_PERMANENT = (ValueError, TypeError, AttributeError, NotImplementedError, ImportError, IsADirectoryError)


def patiently(file: ObjectPath, what: str, request: Callable[[], T]) -> T:
    """Make a request, again and again where that may help; returns its result.

    Raises:
        FileNotFoundError: there is no such object.
        StoreRefused: the store does not permit it. Was tried once.
        StoreUnusable: it failed for ``file.patience_s`` seconds, or in a way that will not change.
    """
    began_s, attempts, limit_s = time.monotonic(), 0, _FIRST_PAUSE_S
    while True:
        attempts += 1
        try:
            return request()
        except Exception as error:
            took_s = time.monotonic() - began_s
            _raise_permanent(file, what, error, attempts, took_s)
            pause_s = random.uniform(0.0, limit_s)
            if took_s + pause_s >= file.patience_s:
                raise StoreUnusable(file, what, _cause(error), attempts, took_s) from error
        time.sleep(pause_s)
        limit_s = min(2 * limit_s, _LONGEST_PAUSE_S)


def _raise_permanent(file: ObjectPath, what: str, error: Exception, attempts: int, took_s: float) -> None:
    """Return if the same request may succeed later."""
    response: dict[str, Any] = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(response, dict) else 0
    if code == "NoSuchBucket":
        fact = f"there is no bucket {file.bucket}"
        raise StoreUnusable(file, what, fact, attempts, took_s, "Make it, or name another.") from error
    if isinstance(error, FileNotFoundError):
        raise FileNotFoundError(errno.ENOENT, "there is no such object", str(file)) from error
    if isinstance(error, PermissionError) or type(error).__name__ in _REFUSALS:
        raise StoreRefused(file, what, _cause(error), attempts, took_s) from error
    is_refused = 400 <= status < 500 and status not in _TRANSIENT_STATUS and code not in _TRANSIENT_CODES
    if is_refused or isinstance(error, _PERMANENT):
        raise StoreUnusable(file, what, _cause(error), attempts, took_s, "It will fail again as it is.") from error


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"

"""S3, and what speaks like it: multipart uploads that go on where they were interrupted."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fsspec.config import conf

from evermesh.checkpoint.errors import StoreRefused
from evermesh.checkpoint.stores.objects import ObjectStore
from evermesh.checkpoint.stores.places import ObjectPath, Place
from evermesh.checkpoint.stores.retrying import patiently

PART_BYTES = 16 << 20
"""Of an upload in parts: S3 takes 10,000 of them, so 156 GiB per file."""
_UPLOADS_IN_FLIGHT = 4
"""Of all files of a process; so many parts are in memory, and one more that is being filled."""
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 5, 20
"""A server that says nothing for so long has failed; the configuration of fsspec may say otherwise."""
_MOST_CONNECTIONS = 16
_log = logging.getLogger(__name__)


class S3Store(ObjectStore):
    """Through s3fs; parts of uploads by the requests below it."""

    def __init__(self, protocol: str) -> None:
        super().__init__(protocol)
        self.fs.retries = 1
        self.writers = ThreadPoolExecutor(_UPLOADS_IN_FLIGHT, thread_name_prefix="store-write")

    def _options(self) -> dict[str, Any]:
        config: dict[str, Any] = {"connect_timeout": _CONNECT_TIMEOUT_S, "read_timeout": _READ_TIMEOUT_S}
        config["max_pool_connections"] = _MOST_CONNECTIONS
        config |= conf.get(self.protocol, {}).get("config_kwargs", {})
        # whoever tries again must know the deadline
        config["retries"] = {"total_max_attempts": 1, "mode": "standard"}
        return super()._options() | {"config_kwargs": config, "max_concurrency": 1}

    def create(self, file: Place) -> "UploadedObject":
        """Begin an object; it is there when it is finished."""
        assert isinstance(file, ObjectPath)
        return UploadedObject(self, file)

    def abort_uploads(self, folder: ObjectPath, concerns: Callable[[str], bool]) -> None:
        """Let the store forget what was uploaded below ``folder`` and never finished, to keys that ``concerns`` holds for."""
        try:
            for upload in self.uploads(folder):
                file = ObjectPath(f"{folder.protocol}://{folder.bucket}/{upload['Key']}", folder.patience_s)
                if concerns(upload["Key"]):
                    self._abort(file, upload["UploadId"])
        except StoreRefused as error:  # to list uploads is a right of its own
            _log.warning("unfinished uploads were not looked for; a lifecycle rule can remove them: %s", error)

    def uploads(self, place: ObjectPath) -> Iterator[dict[str, Any]]:
        """Uploads that were begun and not finished, of keys that begin with that of ``place``."""
        marker: dict[str, str] = {}
        while True:
            page = self.call(place, "listing uploads to", "list_multipart_uploads", Prefix=place.key, **marker)
            yield from (upload for upload in page.get("Uploads", ()) if upload["Key"].startswith(place.key))
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def call(self, file: ObjectPath, what: str, method: str, **fields: Any) -> dict[str, Any]:
        """A request of the S3 protocol about the bucket of ``file``."""
        return patiently(file, what, lambda: dict(self.ask(file, "call_s3", method, Bucket=file.bucket, **fields)))

    def _abort(self, file: ObjectPath, upload: str) -> None:
        try:
            self.call(file, "giving up the upload of", "abort_multipart_upload", Key=file.key, UploadId=upload)
        except FileNotFoundError:  # finished or given up meanwhile
            return

    def _delete(self, files: Sequence[ObjectPath]) -> None:
        keys = [{"Key": file.key} for file in files]
        what = {"Objects": keys, "Quiet": True}
        answer = self.ask(files[0], "call_s3", "delete_objects", Bucket=files[0].bucket, Delete=what)
        for error in answer.get("Errors", ()):  # of single objects; the request itself succeeded
            kind = PermissionError if error.get("Code") == "AccessDenied" else OSError
            raise kind(f"{error.get('Key')}: {error.get('Code')}, {error.get('Message')}")


@dataclass(frozen=True, slots=True)
class _Part:
    """A part that the store has."""

    number: int
    num_bytes: int
    tag: str
    """Of S3: the MD5 of its bytes in quotes, unless the store encrypts with keys of its own."""
    crc32: str | None

    @property
    def entry(self) -> dict[str, Any]:
        fields = {"PartNumber": self.number, "ETag": self.tag}
        return fields if self.crc32 is None else fields | {"ChecksumCRC32": self.crc32}


class UploadedObject:
    """A large object goes up in parts of ``PART_BYTES``, several at a time; a small one by one request.

    Parts of an upload of the same key that was interrupted are kept if they are the same bytes. Such a key belongs to one
    attempt to save, so no other upload writes it.
    """

    def __init__(self, store: S3Store, file: ObjectPath) -> None:
        self._store, self._file = store, file
        self._part, self._filled = bytearray(), 0
        self._parts: list[Future[_Part]] = []
        self._upload = ""
        self._there: dict[int, _Part] = {}

    def write(self, payload: memoryview) -> None:
        """Append bytes; waits while too many parts are on their way."""
        payload = payload.cast("B")
        while payload.nbytes:
            if not self._part:
                self._part = bytearray(PART_BYTES)
            taken = payload[: PART_BYTES - self._filled]
            self._part[self._filled : self._filled + taken.nbytes] = taken
            self._filled += taken.nbytes
            payload = payload[taken.nbytes :]
            if self._filled == PART_BYTES:
                self._send()

    def show(self) -> None:
        """Nobody sees it yet."""

    def finish(self) -> None:
        """Return when the object is there."""
        if not self._parts:
            self._store.put(self._file, bytes(self._part[: self._filled]))
            return
        if self._filled:
            self._send()
        parts = [part.result() for part in self._parts]
        patiently(self._file, "finishing the upload of", lambda: self._complete(parts))

    def close(self) -> None:
        """Leave what is not finished: the next attempt goes on with it, or the next save removes it."""
        for part in self._parts:
            part.cancel()

    def _send(self) -> None:
        if not self._parts:
            self._begin()
        if len(self._parts) >= _UPLOADS_IN_FLIGHT:
            self._parts[-_UPLOADS_IN_FLIGHT].result()
        part, self._part = bytes(memoryview(self._part)[: self._filled]), bytearray()
        self._filled = 0
        self._parts.append(self._store.writers.submit(self._put, len(self._parts) + 1, part))

    def _begin(self) -> None:
        """Take up an upload of this key that was interrupted, or begin one."""
        begun = [upload["UploadId"] for upload in self._found() if upload["Key"] == self._file.key]
        if begun:
            self._upload = begun[-1]
            self._there = {part.number: part for part in self._parts_there()}
            return
        what = "beginning the upload of"
        answer = self._store.call(self._file, what, "create_multipart_upload", Key=self._file.key)
        self._upload = answer["UploadId"]

    def _found(self) -> list[dict[str, Any]]:
        try:
            return list(self._store.uploads(self._file))
        except StoreRefused:  # to list uploads is a right of its own; without it all parts are sent
            return []

    def _parts_there(self) -> Iterator[_Part]:
        marker: dict[str, int] = {}
        while True:
            page = self._call("listing the parts of", "list_parts", **marker)
            for part in page.get("Parts", ()):
                yield _Part(part["PartNumber"], part["Size"], part["ETag"], part.get("ChecksumCRC32"))
            if not page.get("IsTruncated"):
                return
            marker = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def _put(self, number: int, payload: bytes) -> _Part:
        there = self._there.get(number)
        if there is not None and there.num_bytes == len(payload):
            digest = hashlib.md5(payload, usedforsecurity=False).hexdigest()
            if there.tag.strip('"') == digest:
                return there
        answer = self._call(f"uploading part {number} of", "upload_part", PartNumber=number, Body=payload)
        return _Part(number, len(payload), answer["ETag"], answer.get("ChecksumCRC32"))

    def _complete(self, parts: Sequence[_Part]) -> None:
        entries = {"Parts": [part.entry for part in parts]}
        try:
            self._store.ask(
                self._file,
                "call_s3",
                "complete_multipart_upload",
                Bucket=self._file.bucket,
                Key=self._file.key,
                UploadId=self._upload,
                MultipartUpload=entries,
            )
        except FileNotFoundError:
            # finished by a request whose answer was lost
            if self._store.num_bytes(self._file) != sum(part.num_bytes for part in parts):
                raise

    def _call(self, what: str, method: str, **fields: Any) -> dict[str, Any]:
        return self._store.call(self._file, what, method, Key=self._file.key, UploadId=self._upload, **fields)

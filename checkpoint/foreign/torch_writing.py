"""Writes files of ``torch.save`` from values whose tensors are streamed; nothing is held but a group of contents.

Such a file is a zip archive of entries that are not compressed, as ``torch_files`` reads them; the bytes of tensors begin
at multiples of 64, so that ``torch.load(mmap=True)`` works.
"""

import io
import zipfile
from collections.abc import Iterable
from typing import IO, Any

from evermesh.checkpoint.contents import Content, Stream
from evermesh.checkpoint.foreign.pickle_writing import Pickled

_ROOT = "archive"
_VERSION = b"3\n"
_ALIGNMENT_BYTES = 64
_LOCAL_HEADER_BYTES, _ZIP64_BYTES = 30, 20
_PADDING = b"FB"
"""Of an extra field of a zip entry, as torch names it."""


class TorchFile:
    """A file that is to be written: what it describes, and which contents are to follow."""

    def __init__(self, value: Any) -> None:
        pickled = Pickled(value)
        self._payload, self.contents = pickled.payload, tuple(pickled.contents)

    def write(self, file: IO[bytes], stream: Stream) -> int:
        """Append the archive to ``file``, which may hold others before; returns its size in bytes."""
        part = _Part(file)
        with zipfile.ZipFile(part, "w") as archive:
            _entry(archive, "data.pkl", [self._payload])
            _entry(archive, "byteorder", [b"little"])
            for key, content in enumerate(self.contents):
                _entry(archive, f"data/{key}", stream.take(content), content.num_bytes)
            _entry(archive, "version", [_VERSION])
        return part.tell()


def contents_of(files: Iterable[TorchFile]) -> list[Content]:
    """What a stream for ``files`` is to give, in the order of writing."""
    return [content for file in files for content in file.contents]


def _entry(archive: zipfile.ZipFile, name: str, payloads: Iterable[memoryview | bytes], num_bytes: int = 0) -> None:
    entry = zipfile.ZipInfo(f"{_ROOT}/{name}")
    is_large = num_bytes >= zipfile.ZIP64_LIMIT // 2
    assert archive.fp is not None
    before = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(entry.filename) + is_large * _ZIP64_BYTES + 4
    padding = -before % _ALIGNMENT_BYTES
    entry.extra = _PADDING + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(entry, "w", force_zip64=is_large) as into:
        for payload in payloads:
            into.write(payload)


class _Part(io.RawIOBase):
    """What follows in a file, as a file of its own: positions count from where it begins."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._start = file, file.tell()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + self._start * (whence == 0), whence) - self._start

    def write(self, payload: Any) -> int:
        return self._file.write(payload)

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

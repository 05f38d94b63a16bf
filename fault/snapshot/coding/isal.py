"""ISA-L through ctypes, which releases the GIL: found, loaded, and believed only after a test against the NumPy engine.

Functions and table layout: ``isa-l/include/erasure_code.h`` (BSD-3), the same in versions 2.30 to 2.32. The library of
the system comes first, then the one inside the wheel of pyeclib, whose bytes must have the checksum that the wheel
records; pyeclib itself is never imported.
"""

import base64
import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, PackagePath, files
from pathlib import Path

import numpy as np

from evermesh.fault.snapshot.coding.code import Code
from evermesh.fault.snapshot.coding.engine import ByteArray, NumpyEngine, add_ones
from evermesh.fault.snapshot.coding.errors import EngineUnusable
from evermesh.fault.snapshot.coding.field import Matrix

SYSTEM_LIBRARY = "libisal.so.2"
WHEEL = "pyeclib"
_TABLE_BYTES = 32
"""Of one coefficient."""
_PROBED = (1, 31, 64, 4096 + 17)
"""Lengths of the self-test: below, at and beside those of vector registers."""


class IsalEngine:
    """The erasure code functions of one library.

    Raises:
        EngineUnusable: it lacks a function, or computes something else than the NumPy engine.
    """

    name = "isal"

    def __init__(self, library: ctypes.CDLL, where: str) -> None:
        self.where = where
        try:
            self._init_tables = library.ec_init_tables
            self._encode = library.ec_encode_data
            self._update = library.ec_encode_data_update
        except AttributeError as error:
            raise EngineUnusable(f"{where} is no usable ISA-L: {error}") from error
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self._init_tables.argtypes = [integer, integer, pointer, pointer]
        self._encode.argtypes = [integer, integer, integer, pointer, pointer, pointer]
        self._update.argtypes = [integer, integer, integer, integer, pointer, pointer, pointer]
        for function in (self._init_tables, self._encode, self._update):
            function.restype = None
        self._tables = lru_cache(maxsize=1024)(self._make_tables)
        self._test()

    def combine(self, rows: Matrix, sources: Sequence[ByteArray], outputs: Sequence[ByteArray]) -> None:
        """See :class:`Engine`."""
        length = outputs[0].nbytes
        tables = self._tables(rows)
        self._encode(length, len(sources), len(rows), tables, _pointers(sources), _pointers(outputs))

    def add(self, column: Sequence[int], source: ByteArray, outputs: Sequence[ByteArray]) -> None:
        """See :class:`Engine`."""
        if all(coefficient <= 1 for coefficient in column):
            add_ones(column, source, outputs)  # as fast, and no table is read
            return
        tables = self._tables(tuple((coefficient,) for coefficient in column))
        self._update(source.nbytes, 1, len(column), 0, tables, source.ctypes.data, _pointers(outputs))

    def _make_tables(self, rows: Matrix) -> ctypes.Array:
        width = len(rows[0])
        tables = ctypes.create_string_buffer(_TABLE_BYTES * width * len(rows))
        self._init_tables(width, len(rows), bytes(element for row in rows for element in row), tables)
        return tables

    def _test(self) -> None:
        reference, generator = NumpyEngine(), np.random.default_rng(0)
        for code in (Code(1, 1), Code(3, 1), Code(6, 2), Code(5, 3)):
            for length in _PROBED:
                sources = list(generator.integers(0, 256, (code.data, length + 1), np.uint8)[:, 1:])  # not aligned
                expected, found, added = np.zeros((3, code.parity, length), np.uint8)
                reference.combine(code.rows, sources, list(expected))
                self.combine(code.rows, sources, list(found))
                for column, source in zip(zip(*code.rows, strict=True), sources, strict=True):
                    self.add(column, source, list(added))
                if not (np.array_equal(expected, found) and np.array_equal(expected, added)):
                    raise EngineUnusable(f"{self.where} computes wrong parity for {code} and {length} bytes")


def load() -> IsalEngine:
    """The first ISA-L that works.

    Raises:
        EngineUnusable: there is none; the message says what was tried and why each was refused.
    """
    refused = []
    for open_library, where in _candidates():
        try:
            return IsalEngine(open_library(), where)
        except (OSError, EngineUnusable) as error:
            refused.append(str(error))
    raise EngineUnusable(f"{'; '.join(refused)}. Install libisal2 of the system, or the extra evermesh[isal].")


def _candidates() -> Iterator[tuple[Callable[[], ctypes.CDLL], str]]:
    yield lambda: ctypes.CDLL(SYSTEM_LIBRARY), SYSTEM_LIBRARY
    try:
        installed = files(WHEEL) or []
    except PackageNotFoundError:
        yield _without_wheel, WHEEL
        return
    for file in installed:
        if file.name.startswith("libisal") and ".so" in file.name:
            yield partial(_open_recorded, file), str(file.locate())


def _without_wheel() -> ctypes.CDLL:
    raise EngineUnusable(f"{WHEEL} is not installed")


def _open_recorded(file: PackagePath) -> ctypes.CDLL:
    """The library, if its bytes are those that the wheel brought."""
    path = Path(str(file.locate()))
    found = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
    if file.hash is None or (file.hash.mode, file.hash.value) != ("sha256", found):
        raise EngineUnusable(f"{path} is not the file that {WHEEL} installed")
    return ctypes.CDLL(str(path))


def _pointers(arrays: Sequence[ByteArray]) -> ctypes.Array:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))

"""What names a file or a folder of checkpoints: a path of a file system, or a URL of an object store.

Needs nothing but the standard library.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,3}(?=[^/])")
"""One slash is what a ``Path`` leaves of two, three are those of ``file:///``."""
_FILE = "file"


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """A key, or a common beginning of keys, in an object store. Like a ``Path`` it names, and does nothing."""

    url: str
    """PROTOCOL://BUCKET/KEY without a slash at the end."""
    patience_s: float = 120.0
    """How long one request is tried again before it is an error, seconds."""

    def __truediv__(self, name: str) -> "ObjectPath":
        return replace(self, url=f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """What comes after the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectPath":
        """The folder that it is in."""
        return replace(self, url=self.url.rpartition("/")[0])

    @property
    def protocol(self) -> str:
        """Such as ``s3``."""
        return self.url.partition("://")[0]

    @property
    def bucket(self) -> str:
        """The first part of its place in the store."""
        return self.url.partition("://")[2].partition("/")[0]

    @property
    def key(self) -> str:
        """What comes after the bucket; empty for the bucket itself."""
        return self.url.partition("://")[2].partition("/")[2]

    def with_patience(self, patience_s: float) -> "ObjectPath":
        """The same place, with so much patience."""
        return replace(self, patience_s=patience_s)

    def absolute(self) -> "ObjectPath":
        """Itself."""
        return self


Place: TypeAlias = Path | ObjectPath


def place_of(place: "Place | str") -> Place:
    """The place that a text names: a path, ``file://`` and a path, or the URL of an object store such as
    ``s3://BUCKET/PREFIX``.

    Raises:
        ValueError: it is a ``Path`` that was made of a URL.
    """
    if isinstance(place, ObjectPath):
        return place
    found = _URL.match(str(place))
    if found is None:
        return Path(place)
    if not isinstance(place, str):
        raise ValueError(f"{place} is a path that was made of a URL and has lost a slash. Give the URL as text.")
    rest = place[found.end() :]
    return Path(f"/{rest}") if found[1] == _FILE else ObjectPath(f"{found[1]}://{rest.rstrip('/')}")

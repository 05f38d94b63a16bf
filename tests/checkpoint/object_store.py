"""An object store for tests: moto's server in a process of its own on loopback, and what a client must know to find it."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from evermesh.checkpoint.stores.places import ObjectPath, place_of
from evermesh.checkpoint.stores.store import _object_store, objects_of
from tests.checkpoint.fault_proxy import FaultProxy, Weather

_SERVER = """
import os, sys, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # it ends with the tests
print(server.port, flush=True)
server.serve_forever()
"""
BUCKET = "checkpoints"


@dataclass(frozen=True)
class TestStore:
    """A bucket behind a proxy; its weather is fine until a test changes it."""

    __test__ = False

    proxy: FaultProxy

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {
            "AWS_ENDPOINT_URL": self.proxy.url,
            "AWS_ACCESS_KEY_ID": "key-of-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-of-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def place(self, patience_s: float = 20.0) -> ObjectPath:
        """A prefix that nobody else uses."""
        place = place_of(f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}/run")
        assert isinstance(place, ObjectPath)
        return place.with_patience(patience_s)

    def clear_up(self) -> None:
        """Fine weather, and counters at zero."""
        self.proxy.weather = Weather()
        self.proxy.forget()


@contextmanager
def object_store() -> Iterator[TestStore]:
    """A store with an empty bucket, for this process and those that it starts."""
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline())
        with FaultProxy(port) as proxy, pytest.MonkeyPatch.context() as patch:
            store = TestStore(proxy)
            for name, value in store.environment.items():
                patch.setenv(name, value)
            _object_store.cache_clear()  # of the endpoint of an earlier one
            client = objects_of(store.place())
            client.fs.call_s3("create_bucket", Bucket=BUCKET)
            yield store
    finally:
        server.kill()
        server.wait()


def adopt(environment: dict[str, str]) -> None:
    """In a process of a fork server, which was started before there was a store."""
    os.environ.update(environment)

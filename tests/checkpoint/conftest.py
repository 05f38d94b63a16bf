"""The object store of the tests."""

from collections.abc import Iterator

import pytest

from tests.checkpoint.object_store import TestStore, object_store


@pytest.fixture(scope="module")
def one_store() -> Iterator[TestStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(one_store: TestStore) -> Iterator[TestStore]:
    one_store.clear_up()
    yield one_store
    one_store.clear_up()

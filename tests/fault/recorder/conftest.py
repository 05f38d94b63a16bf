"""What tests of the recorder share."""

from pathlib import Path

import pytest

from evermesh.fault.recorder.native.building import build_tap


@pytest.fixture(scope="session")
def native_tap() -> Path:
    """The native tap of this torch; built, if nobody has, which takes half a minute."""
    tap = build_tap()
    assert not tap.refused, tap.refused
    return Path(tap.library)

"""What tests of the suite share with those of the recorder."""

from tests.fault.recorder.conftest import native_tap

__all__ = ["native_tap"]

"""Runs when the interpreter of a rank of a script starts: its first process group starts the recorder.

Python imports a module of this name before anything else. The one that it hides is imported, and children find only
that. Until torch.distributed is loaded nothing happens, and what fails here fails nothing else.
"""

import importlib.machinery
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_MODULE = "torch.distributed.distributed_c10d"


class _Finder:
    """Waits for the module that makes groups."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_arm(module):
                load(module)
                _arm()

            spec.loader.exec_module = load_and_arm
        return spec


def _arm():
    try:
        from evermesh.fault.recorder.in_scripts import arm

        arm()
    except Exception as error:  # noqa: BLE001  the boundary: a script runs whether or not it is recorded
        print(f"evermesh: collectives are not recorded: {type(error).__name__}: {error}", file=sys.stderr)


def _import_hidden():
    """Import the sitecustomize that this one hides, if there is one."""
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]
    left = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.abspath(path) != _HERE]
    if any(left):
        os.environ["PYTHONPATH"] = os.pathsep.join(left)
    else:
        os.environ.pop("PYTHONPATH", None)
    this = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        sys.modules["sitecustomize"] = this


if "EVERMESH_RINGS" in os.environ:
    sys.meta_path.insert(0, _Finder())
_import_hidden()

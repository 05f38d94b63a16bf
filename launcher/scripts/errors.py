"""Errors of this folder.

LauncherError
├── ScriptRefused    (ValueError)    flags, variables or the script itself are wrong; nothing was started
└── NodesMissing     (TimeoutError)  not all machines of a job came in time; nothing was started
"""

from evermesh.launcher.errors import LauncherError


class ScriptRefused(LauncherError, ValueError):
    """A script cannot be launched the way it was asked to."""


class NodesMissing(LauncherError, TimeoutError):
    """Not all machines of a job came in time."""

    exit_code = 1

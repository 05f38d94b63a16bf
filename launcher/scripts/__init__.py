"""Any script: ranks that know nothing of us, with the environment torchrun would give them, on this machine."""

from evermesh.launcher.scripts.command import launch_script
from evermesh.launcher.scripts.flags import is_script, script_help, wants_help

__all__ = ["is_script", "launch_script", "script_help", "wants_help"]

"""The controller's side of watching: what agents tell of records becomes findings while the job runs."""

from evermesh.launcher.controller.watching.watch import Watch

__all__ = ["Watch"]

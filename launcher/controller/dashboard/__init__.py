"""The page on which a job is watched in a browser."""

from evermesh.launcher.controller.dashboard.page import dashboard_router

__all__ = ["dashboard_router"]

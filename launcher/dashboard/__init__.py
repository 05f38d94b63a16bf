"""The page on which a job is watched in a browser, and what is streamed to it."""

from evermesh.launcher.dashboard.page import dashboard_router

__all__ = ["dashboard_router"]

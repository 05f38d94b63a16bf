"""Serves the page: its files hold no secret and ask for no token; what it shows comes from the controller's JSON API.

Nothing is fetched from anywhere else: the plot library is the copy inside the installed plotly package.
"""

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from starlette.staticfiles import StaticFiles

_FILES = Path(__file__).parent / "static"
_PLOTLY = "plotly.js"
_PAGE = "index.html"

_POLICY = (
    "default-src 'self'; "
    "style-src 'self' 'unsafe-inline'; "  # plotly writes its own style element
    "img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_ASK_FIRST = "no-cache"
"""Kept by the browser, but asked for again (by ETag) before use: page and scripts must be of one version."""
_KEEP_A_DAY = "max-age=86400"


def dashboard_router() -> APIRouter:
    """The routes ``/`` and ``/static/NAME``."""
    router = APIRouter(include_in_schema=False)
    found = {path.name: path for path in _FILES.iterdir() if path.name != _PAGE}
    found[_PLOTLY] = Path(str(files("plotly"))) / "package_data" / "plotly.min.js"

    @router.get("/")
    async def page(request: Request) -> Response:
        return _answer(request, _FILES / _PAGE, _ASK_FIRST)

    @router.get("/static/{name}")
    async def static(request: Request, name: str) -> Response:
        if name not in found:
            raise HTTPException(404)
        return _answer(request, found[name], _KEEP_A_DAY if name == _PLOTLY else _ASK_FIRST)

    return router


def _answer(request: Request, path: Path, caching: str) -> Response:
    """The file, streamed; or 304 when the browser has it."""
    response = StaticFiles(directory=path.parent).file_response(path, os.stat(path), request.scope)
    response.headers.update({**_HEADERS, "Cache-Control": caching})
    return response

"""What stands before the API: whoever has no token is refused before a byte of what he sends is kept."""

import hmac
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LONGEST_BODY = 1 << 16
"""Bytes; a request is a handful of fields."""
_POLICY_VIOLATION = 1008


class Guard:
    """An ASGI application that lets requests for ``/api`` through to ``app`` if they show ``token``."""

    def __init__(self, app: "ASGIApp", token: str) -> None:
        self.app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request or connection."""
        if scope["type"] == "http" and _is_guarded(scope):
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket" and not self._shows_token(scope):
            await receive()  # websocket.connect
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        else:
            await self.app(scope, receive, send)

    async def _answer(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if not self._shows_token(scope):
            text = "the token of the run is missing or wrong: Authorization: Bearer TOKEN"
            await JSONResponse({"detail": text}, 401)(scope, receive, send)
            return
        body = await _whole_body(receive)
        if body is None:
            await JSONResponse({"detail": f"longer than {_LONGEST_BODY} bytes"}, 413)(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> "Message":
            return messages.pop() if messages else await receive()

        await self.app(scope, again, send)

    def _shows_token(self, scope: "Scope") -> bool:
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(shown) == 1 and hmac.compare_digest(shown[0], self._expected)


def _is_guarded(scope: "Scope") -> bool:
    return bool(scope["path"].startswith("/api"))


async def _whole_body(receive: "Receive") -> bytes | None:
    """The body of a request; None if it is too long, or its sender is gone."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > _LONGEST_BODY:
            return None
        if not message.get("more_body", False):
            return body

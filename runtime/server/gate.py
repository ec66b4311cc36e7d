"""What every request passes before its route: the API key, and a bound on how many are open."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from llmc.runtime.server.errors import ApiError, error_response, too_busy

_OPEN_PATHS = frozenset({"/health"})


class Gate:
    """ASGI middleware, outermost, so that it also guards paths that do not exist."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_open_requests: int) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()
        self._max_open_requests = max_open_requests
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on or answers it with 401 or 429."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] not in _OPEN_PATHS and not self._has_key(scope):
            refusal = ApiError(
                401,
                "missing or wrong API key",
                hint="send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_response(refusal)(scope, receive, send)
            return
        # Only posts cost anything: health and metrics stay reachable under load.
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._num_open >= self._max_open_requests:
            await error_response(too_busy())(scope, receive, send)
            return
        self._num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= 1

    def _has_key(self, scope: Scope) -> bool:
        if self._api_key is None:
            return True
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (values[0] if len(values) == 1 else b"").partition(b" ")
        matches = hmac.compare_digest(key.strip(), self._api_key)
        return scheme.lower() == b"bearer" and matches

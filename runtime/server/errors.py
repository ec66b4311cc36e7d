"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from llmc.errors import CapacityError, LlmcError, RequestError

_RETRY_AFTER_S = 1  # a step takes far less; a client that comes back each second does no harm


class ApiError(LlmcError):
    """An answer other than 2xx; its message goes to the client and tells nothing of the server."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def too_busy() -> ApiError:
    """429: the queue is full."""
    return ApiError(
        429,
        "the server's queue is full",
        hint="try again after the time in Retry-After",
        code="queue_full",
        headers={"Retry-After": str(_RETRY_AFTER_S)},
    )


def draining() -> ApiError:
    """503: the server finishes what it has and takes nothing new."""
    return ApiError(
        503,
        "the server is shutting down",
        code="draining",
        headers={"Retry-After": str(_RETRY_AFTER_S), "Connection": "close"},
    )


def engine_failed() -> ApiError:
    """500: the engine gave this request up; what happened is in the server's log."""
    return ApiError(500, "the engine failed on this request", code="engine_error")


def as_api_error(exc: LlmcError) -> ApiError:
    """What a client is told of one of the engine's errors."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, RequestError):
        return ApiError(exc.status, exc.message, hint=exc.hint, param=exc.param)
    if isinstance(exc, CapacityError):
        # Of one request: it needs more than the whole cache, so coming back will not help.
        return ApiError(400, exc.message, hint=exc.hint, code="exceeds_capacity")
    return engine_failed()


def error_body(exc: ApiError) -> dict[str, Any]:
    """The JSON object that describes `exc`."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        exc.status, "invalid_request_error" if exc.status < 500 else "server_error"
    )
    message = exc.message if exc.hint is None else f"{exc.message} ({exc.hint})"
    return {"error": {"message": message, "type": kind, "param": exc.param, "code": exc.code}}


def error_response(exc: LlmcError) -> JSONResponse:
    """`exc` as a response."""
    error = as_api_error(exc)
    return JSONResponse(error_body(error), status_code=error.status, headers=error.headers)

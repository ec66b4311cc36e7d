"""Reads a request's JSON body, bounded in size and time, and strict about numbers."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from llmc.runtime.server.errors import ApiError, invalid

__all__ = ["ClientDisconnect", "read_json"]


async def read_json(request: Request, *, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """The body as a JSON object.

    Raises ApiError: 415 for another content type (which also keeps a foreign web page from posting
    to a local server without asking), 413 above `max_bytes`, 408 after `timeout_s`, 400 for what is
    not an object, NaN and infinities included. Raises ClientDisconnect when the client leaves.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(
            415,
            f"the content type is {content_type[:60]!r}, expected 'application/json'",
            code="unsupported_content_type",
        )
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(request, max_bytes)
    except TimeoutError as exc:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s") from exc
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        # Python's own message may quote nothing of the body: position and reason only.
        raise invalid(f"the body is not JSON: {str(exc)[:120]}", code="invalid_json") from exc
    if not isinstance(value, dict):
        raise invalid("the body is not a JSON object", code="invalid_json")
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"the body exceeds {max_bytes} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")

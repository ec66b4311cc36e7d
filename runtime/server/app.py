"""The application: routes, and the one place that turns errors into responses."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from llmc.errors import LlmcError, UsageError
from llmc.runtime.server.body import read_json
from llmc.runtime.server.chat import chat
from llmc.runtime.server.completions import complete
from llmc.runtime.server.engine_thread import EngineThread
from llmc.runtime.server.errors import ApiError, draining, error_response
from llmc.runtime.server.gate import Gate
from llmc.runtime.server.model import ServedModel, ServerLimits

log = logging.getLogger("llmc.server")

_CLIENT_LEFT = 499  # nginx's code; nobody is there to read it

_Endpoint = Callable[[ServedModel, Request, dict[str, Any]], Awaitable[Response]]


def create_app(
    thread: EngineThread, *, api_key: str | None = None, limits: ServerLimits | None = None
) -> FastAPI:
    """OpenAI's API over a started engine thread.

    `api_key` is asked of every route but /health. Raises UsageError where the artifact has no
    tokenizer: the API speaks text.
    """
    limits = limits or ServerLimits()
    tokenizer = thread.engine.tokenizer
    if tokenizer is None:
        raise UsageError(
            f"{thread.engine.manifest.model.name} has no tokenizer, and the API speaks text",
            hint="use `llmc run --ids`, or compile a model that has one",
        )
    model = ServedModel(thread=thread, tokenizer=tokenizer, limits=limits)
    # No documentation pages: they would load scripts from elsewhere.
    app = FastAPI(title="llmc", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, api_key=api_key, max_open_requests=limits.max_open_requests)
    app.add_exception_handler(LlmcError, _on_llmc_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_client_left)
    app.add_exception_handler(Exception, _on_bug)
    _add_status_routes(app, model)
    _add_post(app, model, "/v1/completions", complete)
    _add_post(app, model, "/v1/chat/completions", chat)
    return app


def _add_status_routes(app: FastAPI, model: ServedModel) -> None:
    async def health(request: Request) -> Response:
        if model.thread.draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        alive = model.thread.is_alive
        return JSONResponse(
            {"status": "ok" if alive else "failed"}, status_code=200 if alive else 503
        )

    async def metrics(request: Request) -> Response:
        return Response(
            model.thread.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model.card]})

    async def one_model(request: Request) -> Response:
        model.check_name(request.path_params["name"])
        return JSONResponse(model.card)

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/metrics", metrics, methods=["GET"])
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/v1/models/{name:path}", one_model, methods=["GET"])


def _add_post(app: FastAPI, model: ServedModel, path: str, endpoint: _Endpoint) -> None:
    async def post(request: Request) -> Response:
        # Before the body is read: there is nobody left to work on it.
        if model.thread.draining:
            raise draining()
        body = await read_json(
            request,
            max_bytes=model.limits.max_body_bytes,
            timeout_s=model.limits.body_timeout_s,
        )
        return await endpoint(model, request, body)

    app.add_route(path, post, methods=["POST"])


async def _on_llmc_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, LlmcError)
    return error_response(exc)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    message = {
        404: f"there is no {request.method} {request.url.path[:80]}",
        405: f"{request.method} is not allowed on {request.url.path[:80]}",
    }.get(exc.status_code, "the request was refused")
    headers = dict(exc.headers or {})
    return error_response(ApiError(exc.status_code, message, headers=headers))


async def _on_client_left(request: Request, exc: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _on_bug(request: Request, exc: Exception) -> Response:
    # Starlette raises it again for the server's log; the client learns nothing of the inside.
    return error_response(ApiError(500, "internal error", code="internal_error"))

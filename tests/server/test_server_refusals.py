"""What the server does not take: every refusal is OpenAI's error object and leaves no trace."""

from __future__ import annotations

import json
import time

import httpx
import openai
import pytest
from serving import RunningServer, running_server, toy_engine

from llmc.errors import UsageError
from llmc.runtime.server.app import create_app
from llmc.runtime.server.engine_thread import EngineThread
from llmc.runtime.server.model import ServerLimits

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def check_error(response: httpx.Response, status: int, param: str | None = None) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["param"] == param
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [99_999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": "hello " * 5000}, "prompt"),
        ({"prompt": [5] * 512}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**20}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 10_000}, "n"),
        ({"n": 100, "prompt": ["a", "b"]}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"guided_json": {}}, "guided_json"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"other": 1}}, "stream_options"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
    ],
)
def test_a_wrong_completion_request_is_named(shared: RunningServer, change, param) -> None:
    body = json.dumps({"model": "toy", "prompt": "hello", **change})
    response = httpx.post(
        shared.url + COMPLETIONS, content=body, headers={"Content-Type": "application/json"}
    )
    check_error(response, 400, param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": "hi", "mood": "bad"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "hi", "tool_call_id": "1"}]}, "tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "hello " * 5000}]}, "prompt"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"prompt": "hello"}, "prompt"),
    ],
)
def test_a_wrong_chat_request_is_named(shared: RunningServer, change, param) -> None:
    response = shared.post(CHAT, {"model": "toy", "messages": USER, **change})
    check_error(response, 400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"[]",
        b"\xff\xfe",
        b'{"prompt": "hi", "temperature": NaN}',
        b'{"prompt": "hi", "temperature": Infinity}',
        b'{"prompt": "hi", "temperature": 1e999}',
        b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_a_body_that_is_no_proper_json_is_refused(shared: RunningServer, body: bytes) -> None:
    response = httpx.post(
        shared.url + COMPLETIONS, content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_refusals_left_the_server_as_it_was(shared: RunningServer) -> None:
    shared.wait_until_free()
    answer = shared.client.completions.create(model="toy", prompt="hi", max_tokens=3)
    assert answer.usage.completion_tokens == 3


def test_another_model_is_not_found(shared: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        shared.client.completions.create(model="gpt-9", prompt="hi")
    assert caught.value.code == "model_not_found"
    assert "'toy'" in caught.value.message
    check_error(httpx.get(f"{shared.url}/v1/models/other/name"), 404, "model")


def test_unknown_paths_and_methods_have_error_bodies(shared: RunningServer) -> None:
    check_error(httpx.get(f"{shared.url}/v1/nothing"), 404)
    check_error(httpx.get(shared.url + CHAT), 405)
    for path in ("/docs", "/openapi.json", "/redoc"):
        check_error(httpx.get(shared.url + path), 404)


def test_only_json_may_be_posted(shared: RunningServer) -> None:
    """A foreign web page can post forms and plain text to a local server, but not JSON."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = httpx.post(
            shared.url + COMPLETIONS,
            content=b'{"prompt": "hi"}',
            headers={"Content-Type": content_type},
        )
        check_error(response, 415)


def test_a_body_above_the_limit_is_refused_however_it_is_sent() -> None:
    with running_server(limits=ServerLimits(max_body_bytes=1000)) as server:
        headers = {"Content-Type": "application/json"}
        body = b'{"prompt": "' + b"a" * 2000 + b'"}'
        url = server.url + COMPLETIONS
        check_error(httpx.post(url, content=body, headers=headers), 413)
        check_error(httpx.post(url, content=iter([body[:600], body[600:]]), headers=headers), 413)
        assert server.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 1}).status_code == 200


def test_a_body_that_does_not_come_is_given_up() -> None:
    def trickle():
        yield b"{"
        time.sleep(1)
        yield b"}"

    with running_server(limits=ServerLimits(body_timeout_s=0.2)) as server:
        response = httpx.post(
            server.url + COMPLETIONS,
            content=trickle(),
            headers={"Content-Type": "application/json"},
        )
        check_error(response, 408)


def test_the_key_is_asked_of_every_route_but_health() -> None:
    with running_server(api_key="sesame") as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        for path in ("/v1/models", "/v1/models/toy", "/metrics", "/nothing", "/health/x"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "sesame"},
                {"Authorization": "Basic sesame"},
                {"Authorization": "Bearer sesame sesame"},
                {"Authorization": b"Bearer s\xc3\xa9same"},
            ):
                response = httpx.get(server.url + path, headers=headers)
                assert check_error(response, 401)["code"] == "invalid_api_key"
        check_error(server.post(CHAT, {"messages": USER}), 401)
        with pytest.raises(openai.AuthenticationError):
            server.client.models.list()
        good = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{server.url}/v1/models", headers=good).status_code == 200
        assert httpx.get(f"{server.url}/nothing", headers=good).status_code == 404


def test_errors_of_the_template_reach_the_client_as_their_own(shared: RunningServer) -> None:
    template = shared.engine.chat_template
    try:
        shared.engine.chat_template = type(template)("{{ raise_exception('no system here') }}")
        error = check_error(shared.post(CHAT, {"messages": USER}), 400, "messages")
        assert "no system here" in error["message"]
    finally:
        shared.engine.chat_template = template


def test_a_prompt_the_cache_can_never_hold_is_a_client_error() -> None:
    with running_server(toy_engine(kv_cache_tokens=64)) as server:
        error = check_error(server.post(COMPLETIONS, {"prompt": [5] * 100}), 400)
        assert "64" in error["message"]


def test_an_artifact_without_a_tokenizer_is_not_served() -> None:
    engine = toy_engine()
    engine.tokenizer = None
    with pytest.raises(UsageError, match="no tokenizer"):
        create_app(EngineThread(engine))

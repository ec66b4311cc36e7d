"""What a request leaves open, the model's own generation_config.json says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import RunningServer, running_server, toy_engine

from llmc.runtime.sampling_params import SamplingParams

STATED = {"temperature": 5.0, "top_p": 0.9}
ASKED = {"max_tokens": 24, "seed": 3}
MESSAGES = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(toy_engine(sampling_defaults=STATED)) as server:
        yield server


def direct(prompt: str | list[int], **params: object) -> str:
    """The answer of an engine without defaults to explicit parameters."""
    return toy_engine().generate([prompt], SamplingParams(**ASKED, **params))[0].text


def test_a_completion_is_sampled_as_the_model_says(server: RunningServer) -> None:
    answer = server.client.completions.create(model="toy", prompt="hello", **ASKED)
    assert answer.choices[0].text == direct("hello", **STATED) != direct("hello")


def test_a_chat_answer_is_sampled_as_the_model_says(server: RunningServer) -> None:
    answer = server.client.chat.completions.create(model="toy", messages=MESSAGES, **ASKED)
    prompt = toy_engine().chat_prompt(MESSAGES)
    assert answer.choices[0].message.content == direct(prompt, **STATED)


@pytest.mark.parametrize("asked", [{"temperature": 0}, {"top_p": 1}])
def test_what_a_client_asks_for_goes_before(server: RunningServer, asked: dict) -> None:
    answer = server.client.completions.create(model="toy", prompt="hello", **ASKED, **asked)
    assert answer.choices[0].text == direct("hello", **{**STATED, **asked})
    assert answer.choices[0].text != direct("hello", **STATED)

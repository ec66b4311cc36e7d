"""`llmc serve` on the demo's artifact, as a client of OpenAI's library meets it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

ROOT = Path(__file__).parents[2]
QUESTION = {"role": "user", "content": "What is the capital of France, and what is it known for?"}


@pytest.fixture(scope="module")
def server(demo_keep: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The root URL of a running server, and its process."""
    command = [sys.executable, "-m", "llmc.cli.main", "serve", demo_keep, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            base_url = process.stdout.readline().strip()
            assert base_url.endswith("/v1")
            yield base_url.removesuffix("/v1"), process
        finally:
            process.kill()


def test_a_streamed_chat_answers_and_is_counted(server: tuple[str, subprocess.Popen[str]]) -> None:
    url, _ = server
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    [model] = client.models.list().data
    chunks = list(
        client.chat.completions.create(
            model=model.id,
            messages=[QUESTION],
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(text != "" for text in texts) > 10, "one chunk is no stream"
    assert "Paris" in "".join(texts)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 24
    # The template's system prompt included; the ids are those of the recorded reference.
    assert chunks[-1].usage.prompt_tokens == 44

    metrics = httpx.get(f"{url}/metrics").text
    assert metric(metrics, "llmc_generation_tokens_total") == 24
    assert metric(metrics, "llmc_prompt_tokens_total") == 44
    assert metric(metrics, "llmc_num_requests_running") == 0
    assert metric(metrics, "llmc_time_to_first_token_seconds_count") == 1


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(
    server: tuple[str, subprocess.Popen[str]],
) -> None:
    url, _ = server
    body = {"model": "smollm2-135m-instruct", "prompt": [1] * 9000, "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "9000 tokens" in answer.json()["error"]["message"]
    assert "8192" in answer.json()["error"]["message"]


def test_sigterm_drains_and_ends_the_server(
    server: tuple[str, subprocess.Popen[str]],
) -> None:
    url, process = server
    assert httpx.get(f"{url}/health").status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def metric(text: str, name: str) -> float:
    [value] = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return float(value)

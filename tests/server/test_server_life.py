"""Requests that end early, overload, failures inside, metrics and the drain on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import APIError, InternalServerError, OpenAI, RateLimitError
from serving import RunningServer, running_server, toy_engine
from toy_artifact import write_artifact

from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.server.engine_thread import EngineThread
from llmc.runtime.server.model import ServerLimits

LONG = {"max_tokens": 400, "temperature": 0.0, "ignore_eos": True}
TOY_CLI = Path(__file__).parents[1] / "cli" / "toy_artifact.py"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_request(
    server: RunningServer, path: str, stream: bool
) -> None:
    server.slow_down(0.01)
    body = (
        {"prompt": "hello"}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": "hi"}]}
    )
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream(
            "POST", server.url + path, json={**body, **LONG, "n": 2, "stream": stream}, timeout=0.5
        ) as response,
    ):
        for _ in response.iter_raw():
            assert server.engine.stats.num_running == 2
            break
    server.wait_until_free()
    # 400 tokens were asked for; what was computed says that it stopped long before.
    assert server.engine.stats.generation_tokens_total < 300


def test_a_client_that_leaves_the_queue_never_runs(server: RunningServer) -> None:
    server.slow_down(0.02)
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(server.post, "/v1/completions", {"prompt": "a", **LONG, "n": 8})
        server.wait_for(lambda: server.engine.stats.num_running == 8)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "b", **LONG}, timeout=0.3)
        server.wait_for(lambda: server.engine.stats.num_waiting == 0)
        assert server.engine.stats.num_running == 8
        server.slow_down(0)
        assert filling.result().status_code == 200
    assert server.engine.stats.generation_tokens_total == 8 * 400


def test_a_full_queue_is_answered_by_429_with_retry_after() -> None:
    with running_server(toy_engine(max_waiting=8)) as server:
        server.slow_down(0.02)
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(server.post, "/v1/completions", {"prompt": "a", **LONG, "n": 8})
            server.wait_for(lambda: server.engine.stats.num_running == 8)
            waiting = pool.submit(server.post, "/v1/completions", {"prompt": "b", **LONG, "n": 8})
            server.wait_for(lambda: server.engine.stats.num_waiting == 8)
            for stream in (False, True):
                with pytest.raises(RateLimitError) as caught:
                    server.client.completions.create(model="toy", prompt="c", stream=stream)
                assert int(caught.value.response.headers["retry-after"]) >= 1
                assert caught.value.code == "queue_full"
            # Several prompts are taken or refused together.
            assert server.post("/v1/completions", {"prompt": ["c", "d"]}).status_code == 429
            assert server.engine.stats.num_waiting == 8
            server.slow_down(0)
            assert running.result().status_code == waiting.result().status_code == 200


def test_too_many_open_requests_are_answered_by_429() -> None:
    with running_server(limits=ServerLimits(max_open_requests=1)) as server:
        server.slow_down(0.02)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.post, "/v1/completions", {"prompt": "a", **LONG})
            server.wait_for(lambda: server.engine.stats.num_running == 1)
            refused = server.post("/v1/completions", {"prompt": "b"})
            assert refused.status_code == 429
            assert "retry-after" in refused.headers
            assert httpx.get(f"{server.url}/health").status_code == 200
            server.slow_down(0)
            assert running.result().status_code == 200


def test_a_failing_device_ends_its_requests_and_not_the_server(server: RunningServer) -> None:
    executor = server.engine._executor
    executor.fail_next = RuntimeError("secret of the device")
    with pytest.raises(InternalServerError) as caught:
        server.client.completions.create(model="toy", prompt="hello")
    assert caught.value.code == "engine_error"
    assert "secret" not in caught.value.message
    server.slow_down(0.01)
    stream = server.client.completions.create(
        model="toy", prompt="hello", stream=True, **_sdk(LONG)
    )
    next(stream)
    executor.fail_next = RuntimeError("secret of the device")
    with pytest.raises(APIError, match="the engine failed"):
        list(stream)
    server.wait_until_free()
    server.slow_down(0)
    answer = server.client.completions.create(model="toy", prompt="hello", max_tokens=3)
    assert answer.usage.completion_tokens == 3


def _sdk(fields: dict) -> dict:
    known = {name: value for name, value in fields.items() if name != "ignore_eos"}
    return {**known, "extra_body": {"ignore_eos": True}}


def test_a_fault_of_the_engine_itself_does_not_end_its_thread(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_step() -> None:
        raise AssertionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "step", broken_step)
        assert server.post("/v1/completions", {"prompt": "hello"}).status_code == 500
    server.wait_until_free()
    assert server.post("/v1/completions", {"prompt": "hello"}).status_code == 200
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_submission_whose_caller_has_left_is_undone() -> None:
    """The thread is busy when the caller leaves: the submission still waits in its queue."""
    engine = toy_engine()
    thread = EngineThread(engine)
    busy = threading.Event()

    async def submit() -> None:
        async with thread.generate([[5, 6]], SamplingParams()):
            pytest.fail("the submission cannot have been done yet")

    async def leave_early() -> None:
        thread._post(busy.wait)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(submit(), 0.05)
        busy.set()
        await thread.fail_all(AssertionError())  # returns after all that was queued before

    thread.start()
    asyncio.run(leave_early())
    thread.stop()
    assert engine.stats.num_waiting == engine.stats.num_running == thread.num_streams == 0


def test_metrics_count_what_was_done(server: RunningServer) -> None:
    before = _metrics(server)
    assert before["llmc_generation_tokens_total"] == 0
    for _ in range(2):
        server.client.completions.create(model="toy", prompt=[5, 6, 7], max_tokens=4, temperature=0)
    after = _metrics(server)
    assert after["llmc_prompt_tokens_total"] == 6
    assert after["llmc_generation_tokens_total"] == 8
    assert after["llmc_time_to_first_token_seconds_count"] == 2
    assert after["llmc_inter_token_latency_seconds_count"] == 2 * 3
    assert after["llmc_e2e_request_latency_seconds_count"] == 2
    assert after["llmc_e2e_request_latency_seconds_sum"] > 0
    assert after["llmc_num_preemptions_total"] == 0
    assert after["llmc_num_requests_running"] == after["llmc_num_requests_waiting"] == 0
    server.slow_down(0.01)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={"prompt": "a", "stream": True, **LONG}
    ) as response:
        chunks = response.iter_raw()  # kept: without its iterator httpx closes the connection
        next(chunks)
        during = _metrics(server)
    assert during["llmc_num_requests_running"] == 1
    assert 0 < during["llmc_kv_cache_usage_ratio"] < 1


def _metrics(server: RunningServer) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.M)}


class Served:
    """`llmc serve` over the toy, as a process."""

    def __init__(self, directory: Path, *options: str, delay_s: float) -> None:
        write_artifact(directory)
        self.process = subprocess.Popen(
            [sys.executable, TOY_CLI, str(delay_s), "serve", directory, "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(TOY_CLI.parents[2])},
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.process.stderr.read()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator:
    served: list[Served] = []

    def start(*options: str, delay_s: float = 0.01) -> Served:
        served.append(Served(tmp_path / "toy", *options, delay_s=delay_s))
        return served[-1]

    yield start
    for one in served:
        one.stop()


def test_sigterm_drains_the_server(serve) -> None:
    served = serve()
    client = OpenAI(base_url=served.url, api_key="none", max_retries=0)
    options = {"temperature": 0, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(
        model="toy",
        prompt="hello",
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    next(stream)
    served.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 5
    while httpx.get(served.url.removesuffix("/v1") + "/health").status_code == 200:
        assert time.monotonic() < deadline
    refused = httpx.post(f"{served.url}/completions", json={"prompt": "late"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert "retry-after" in refused.headers
    *_, last = stream
    assert last.usage.completion_tokens == 100
    assert served.process.wait(10) == 0
    assert "drained" in served.process.stderr.read()


def test_the_drain_has_an_end(serve) -> None:
    served = serve("--drain-timeout", "0.3", delay_s=0.05)
    client = OpenAI(base_url=served.url, api_key="none", max_retries=0)
    options = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model="toy", prompt="hello", stream=True, **options)
    next(stream)
    start = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    with pytest.raises(APIError, match="shutting down"):
        list(stream)
    assert served.process.wait(10) == 0
    assert time.monotonic() - start < 5  # 400 tokens would have taken 20 s


def test_an_idle_server_leaves_at_once(serve) -> None:
    served = serve()
    start = time.monotonic()
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(10) == 0
    assert time.monotonic() - start < 3


def test_serve_reads_the_key_and_refuses_a_taken_port(serve, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("open-sesame\n")
    served = serve("--api-key-file", str(key_file))
    assert httpx.get(f"{served.url}/models").status_code == 401
    models = OpenAI(base_url=served.url, api_key="open-sesame").models.list()
    assert [model.id for model in models] == ["toy"]
    port = served.url.split(":")[2].split("/")[0]
    command = [sys.executable, "-m", "llmc.cli.main", "serve", tmp_path, "--port", port]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 2
    assert f"port {port}" in second.stderr
    assert "hint:" in second.stderr

"""A real server over the toy model, for tests that talk to it."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from openai import OpenAI

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

from toy_artifact import TEMPLATE, SlowExecutor, byte_level_tokenizer, toy_manifest

from llmc.runtime.chat_template import ChatTemplate
from llmc.runtime.engine import Engine
from llmc.runtime.server.app import create_app
from llmc.runtime.server.engine_thread import EngineThread


def toy_engine(*, kv_cache_tokens: int = 4096, **options: object) -> Engine:
    manifest = toy_manifest()
    num_pages = [kv_cache_tokens // manifest.groups[0].page_size]
    return Engine.from_parts(
        manifest,
        SlowExecutor(manifest, num_pages),
        num_pages=num_pages,
        tokenizer=byte_level_tokenizer(),
        chat_template=ChatTemplate(TEMPLATE),
        **options,
    )


@dataclass
class RunningServer:
    """A real uvicorn on a loopback port over the toy model."""

    url: str
    engine: Engine
    thread: EngineThread

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def post(self, path: str, body: object, **options: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30, **options)

    def slow_down(self, delay_s: float) -> None:
        self.engine._executor.delay_s = delay_s

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"still {self.engine.stats}"
            time.sleep(0.01)

    def wait_until_free(self) -> None:
        """Until no sequence runs or waits and every page is free again."""
        self.wait_for(
            lambda: (
                self.engine.stats.num_running == 0
                and self.engine.stats.num_waiting == 0
                and self.engine.stats.kv_cache_usage_ratio == 0
                and self.thread.num_streams == 0
            )
        )


@contextmanager
def running_server(engine: Engine | None = None, **options: object) -> Iterator[RunningServer]:
    """Serves until the context is left; `options` are create_app's."""
    engine = engine or toy_engine()
    thread = EngineThread(engine)
    thread.start()
    sock = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(thread, **options), log_config=None, lifespan="off", ws="none"
    )
    server = uvicorn.Server(config)
    running = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    running.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield RunningServer(f"http://127.0.0.1:{sock.getsockname()[1]}", engine, thread)
    finally:
        server.should_exit = server.force_exit = True
        running.join(10)
        thread.stop()

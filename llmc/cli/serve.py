"""`llmc serve`: OpenAI's API over one artifact."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import click

from llmc.cli.console import say
from llmc.cli.options import artifact_argument, device_option, kv_cache_option, open_engine
from llmc.errors import UsageError


@click.command()
@artifact_argument
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, help="Port; 0 takes a free one."
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the key that clients must send.",
)
@click.option(
    "--max-waiting", type=click.IntRange(min=1), default=1024, help="Most sequences in the queue."
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    help="Seconds that running requests may take after SIGTERM.",
)
@kv_cache_option
@device_option
def serve(
    directory: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    max_waiting: int,
    drain_timeout: float,
    kv_cache_tokens: int | None,
    device: str | None,
) -> None:
    """Serve OpenAI's API: completions, chat completions, models, /health and /metrics.

    The base URL goes to stdout when requests are accepted. SIGTERM and Ctrl-C drain the server: new
    requests get 503, running ones finish.
    """
    api_key = None if api_key_file is None else _read_key(api_key_file)
    from llmc.runtime.server.serve import bind, url_of
    from llmc.runtime.server.serve import serve as serve_engine

    # Before the engine: a taken port should not cost the time to load it.
    sock = bind(host, port)
    engine = open_engine(
        directory, device=device, kv_cache_tokens=kv_cache_tokens, max_waiting=max_waiting
    )

    def on_ready() -> None:
        say(f"{engine.manifest.model.name} is served; Ctrl-C drains and stops")
        if api_key is None and not _is_loopback(sock.getsockname()[0]):
            say(f"warning: whoever reaches {host} can use it; --api-key-file asks for a key")
        click.echo(url_of(sock))

    serve_engine(engine, sock, api_key=api_key, drain_timeout_s=drain_timeout, on_ready=on_ready)
    say("drained")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _read_key(path: Path) -> str:
    key = path.read_text(encoding="utf-8", errors="replace").strip()
    if not key or not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(
            f"{path}: expected one API key of printable ASCII characters",
            hint="for example: openssl rand -hex 32 > FILE",
        )
    return key

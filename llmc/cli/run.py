"""`llmc run`: one prompt, one answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmc.cli.console import format_seconds, printable, say
from llmc.cli.options import (
    artifact_argument,
    device_option,
    kv_cache_option,
    open_engine,
    sampling_options,
    sampling_params,
)
from llmc.errors import LlmcError, UsageError

if TYPE_CHECKING:
    from llmc.runtime.engine import Engine
    from llmc.runtime.outputs import Delta


@click.command()
@artifact_argument
@click.option("-p", "--prompt", help="The prompt; - reads it from stdin.")
@click.option("--ids", metavar="1,2,3", help="The prompt as token ids; needs no tokenizer.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the chat template.")
@sampling_options(max_tokens=256, temperature=0.0)
@device_option
@kv_cache_option
def run(
    directory: Path,
    prompt: str | None,
    ids: str | None,
    raw: bool,
    device: str,
    kv_cache_tokens: int | None,
    **sampling: Any,  # noqa: ANN401
) -> None:
    """Answer one prompt, streaming to stdout.

    The prompt goes through the model's chat template where the artifact has one. Timings go to
    stderr.
    """
    if (prompt is None) == (ids is None):
        raise UsageError("give the prompt either by -p or by --ids")
    token_ids = None if ids is None else _parse_ids(ids)
    params = sampling_params(sampling)
    if prompt == "-":
        prompt = sys.stdin.read()
    engine = open_engine(directory, device=device, kv_cache_tokens=kv_cache_tokens)
    if token_ids is None:
        assert prompt is not None
        token_ids = _prompt_ids(engine, prompt, raw=raw)
    timing = Timing()
    num_written = 0
    failed = False
    for delta in timing.watch(engine.stream(token_ids, params)):
        failed = delta.finish_reason == "error"
        if engine.tokenizer is not None:
            click.echo(printable(delta.text), nl=False)
        else:
            for token_id in delta.token_ids:
                click.echo(f",{token_id}" if num_written else str(token_id), nl=False)
                num_written += 1
        sys.stdout.flush()
    click.echo()
    if failed:
        raise LlmcError(
            "the engine failed on this prompt", hint=f"llmc verify {directory} checks the artifact"
        )
    say(timing.summary())


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as exc:
        raise UsageError(
            f"--ids: {text[:60]!r} is no list of token ids", hint="for example --ids 1,2,3"
        ) from exc


def _prompt_ids(engine: Engine, prompt: str, *, raw: bool) -> list[int]:
    if engine.tokenizer is None:
        raise UsageError("the artifact has no tokenizer", hint="give token ids: --ids 1,2,3")
    if raw or engine.chat_template is None:
        return engine.tokenizer.encode(prompt)
    return engine.chat_prompt([{"role": "user", "content": prompt}])


@dataclass(slots=True)
class Timing:
    """Counts and times one answer's tokens."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float = 0.0

    def watch(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        """Passes `deltas` on; the clock starts now."""
        start = time.perf_counter()
        for delta in deltas:
            self.num_prompt_tokens = delta.num_prompt_tokens
            self.num_generated_tokens += len(delta.token_ids)
            self.last_token_s = time.perf_counter() - start
            if self.first_token_s is None:
                self.first_token_s = self.last_token_s
            yield delta

    def summary(self) -> str:
        """One line: tokens, tokens/s after the first, time to the first."""
        line = f"[{self.num_prompt_tokens} prompt tokens, {self.num_generated_tokens} generated"
        if self.first_token_s is not None:
            line += f"; first token after {format_seconds(self.first_token_s)}"
            seconds = self.last_token_s - self.first_token_s
            if self.num_generated_tokens > 1 and seconds > 0:
                line += f", then {(self.num_generated_tokens - 1) / seconds:.1f} tokens/s"
        return line + "]"

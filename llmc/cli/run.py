"""`llmc run`: one prompt, one answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmc.cli.console import format_seconds, print_json, printable, say
from llmc.cli.options import (
    artifact_argument,
    device_option,
    given_sampling,
    json_option,
    kv_cache_option,
    open_engine,
    sampling_options,
    sampling_params,
)
from llmc.errors import LlmcError, UsageError

if TYPE_CHECKING:
    from llmc.runtime.engine import Engine
    from llmc.runtime.outputs import ChoiceOutput, Delta
    from llmc.runtime.tokenizer import Tokenizer


_TEMPERATURE = 0.0  # where neither the user nor the model says


@click.command()
@artifact_argument
@click.option("-p", "--prompt", help="The prompt; - reads it from stdin.")
@click.option("--ids", metavar="1,2,3", help="The prompt as token ids; needs no tokenizer.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the chat template.")
@sampling_options(max_tokens=256, temperature=_TEMPERATURE)
@device_option
@kv_cache_option
@json_option
def run(
    directory: Path,
    prompt: str | None,
    ids: str | None,
    raw: bool,
    device: str | None,
    kv_cache_tokens: int | None,
    as_json: bool,
    **sampling: Any,  # noqa: ANN401
) -> None:
    """Answer one prompt, streaming to stdout.

    The prompt goes through the model's chat template where the artifact has one. Timings go to
    stderr; with --json they are part of one object, printed when the answer is complete.
    """
    if (prompt is None) == (ids is None):
        raise UsageError("give the prompt either by -p or by --ids")
    token_ids = None if ids is None else _parse_ids(ids)
    given = given_sampling(sampling)
    if prompt == "-":
        prompt = sys.stdin.read()
    engine = open_engine(directory, device=device, kv_cache_tokens=kv_cache_tokens)
    if token_ids is None:
        assert prompt is not None
        token_ids = _prompt_ids(engine, prompt, raw=raw)
    from llmc.runtime.outputs import ChoiceOutput

    params = sampling_params(engine, given, temperature=_TEMPERATURE)
    timing = Timing()
    answer = ChoiceOutput(index=0)
    for delta in timing.watch(engine.stream(token_ids, params)):
        if not as_json:
            _write(delta, engine.tokenizer, is_first=not answer.token_ids)
        answer.add(delta)
    if not as_json:
        click.echo()
    if answer.finish_reason == "error":
        raise LlmcError(
            "the engine failed on this prompt", hint=f"llmc verify {directory} checks the artifact"
        )
    if as_json:
        print_json(_as_json(engine, answer, timing))
    else:
        say(timing.summary())


def _write(delta: Delta, tokenizer: Tokenizer | None, *, is_first: bool) -> None:
    """Writes the text, or token ids with commas between them where there is no tokenizer."""
    if tokenizer is not None:
        click.echo(printable(delta.text), nl=False)
    elif delta.token_ids:
        ids = ",".join(map(str, delta.token_ids))
        click.echo(ids if is_first else f",{ids}", nl=False)
    sys.stdout.flush()


def _as_json(engine: Engine, answer: ChoiceOutput, timing: Timing) -> dict[str, Any]:
    return {
        "model": engine.manifest.model.name,
        "text": None if engine.tokenizer is None else answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "num_prompt_tokens": timing.num_prompt_tokens,
        "num_generated_tokens": timing.num_generated_tokens,
        "seconds": timing.last_token_s,
        "seconds_to_first_token": timing.first_token_s,
        "tokens_per_second": timing.tokens_per_second,
    }


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

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None where there was no second."""
        seconds = self.last_token_s - (self.first_token_s or 0.0)
        if self.num_generated_tokens < 2 or seconds <= 0:
            return None
        return (self.num_generated_tokens - 1) / seconds

    def summary(self) -> str:
        """One line: tokens, tokens/s after the first, time to the first."""
        line = f"[{self.num_prompt_tokens} prompt tokens, {self.num_generated_tokens} generated"
        if self.first_token_s is not None:
            line += f"; first token after {format_seconds(self.first_token_s)}"
            if self.tokens_per_second is not None:
                line += f", then {self.tokens_per_second:.1f} tokens/s"
        return line + "]"

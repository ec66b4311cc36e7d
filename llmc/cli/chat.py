"""`llmc chat`: a conversation in the terminal, or on a pipe with one message a line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from llmc.cli.console import printable, say
from llmc.cli.options import (
    artifact_argument,
    device_option,
    given_sampling,
    kv_cache_option,
    open_engine,
    sampling_options,
    sampling_params,
)
from llmc.cli.run import Timing
from llmc.errors import CapacityError, RequestError, UsageError

if TYPE_CHECKING:
    from llmc.runtime.engine import Engine
    from llmc.runtime.outputs import Delta
    from llmc.runtime.sampling_params import SamplingParams

_TEMPERATURE = 0.7  # where neither the user nor the model says
_HELP = """/reset  forget the conversation
/help   this list
/exit   leave (so does Ctrl-D); Ctrl-C stops an answer"""


@click.command()
@artifact_argument
@click.option("--system", help="The system message.")
@sampling_options(max_tokens=1024, temperature=_TEMPERATURE)
@device_option
@kv_cache_option
def chat(
    directory: Path,
    system: str | None,
    device: str | None,
    kv_cache_tokens: int | None,
    **sampling: Any,  # noqa: ANN401
) -> None:
    """Talk with the model; /help lists the commands.

    On a pipe every line is a message, and only the answers go to stdout.
    """
    given = given_sampling(sampling)
    engine = open_engine(directory, device=device, kv_cache_tokens=kv_cache_tokens)
    if engine.tokenizer is None or engine.chat_template is None:
        missing = "tokenizer" if engine.tokenizer is None else "chat template"
        raise UsageError(
            f"the artifact has no {missing}, so it cannot chat", hint=f"llmc run {directory}"
        )
    if sys.stdin.isatty():
        say(f"{engine.manifest.model.name}; /help lists the commands")
    params = sampling_params(engine, given, temperature=_TEMPERATURE)
    conversation = Conversation(engine, params, system=system)
    for line in _lines():
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/help":
                say(_HELP)
            case "/reset":
                conversation.reset()
                say("the conversation is forgotten")
            case command if command.startswith("/"):
                say(f"unknown command {command.split()[0]}; /help lists the commands")
            case _:
                conversation.answer(line)


class Conversation:
    """The messages so far."""

    def __init__(self, engine: Engine, params: SamplingParams, *, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self._messages = list(self._opening)

    def answer(self, message: str) -> None:
        """Streams the answer to stdout; a message the model cannot take is dropped, saying why."""
        self._messages.append({"role": "user", "content": message})
        timing = Timing()
        pieces: list[str] = []
        failed = False
        try:
            with _Interrupts() as ctrl_c:
                prompt = self._engine.chat_prompt(self._messages)
                for delta in timing.watch(self._stream(prompt, ctrl_c)):
                    failed = delta.finish_reason == "error"
                    pieces.append(delta.text)
                    click.echo(printable(delta.text), nl=False)
                    sys.stdout.flush()
        except (RequestError, CapacityError) as exc:
            self._messages.pop()
            say(f"error: {exc}\nthe message was dropped; /reset forgets the conversation")
            return
        click.echo()
        # Half an answer stays in the conversation: the user has read it.
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
        if failed:
            say("error: the engine failed on this answer; `llmc verify` checks the artifact")
        else:
            say("[stopped]" if ctrl_c.pressed else timing.summary())

    def _stream(self, prompt: list[int], ctrl_c: _Interrupts) -> Iterator[Delta]:
        """Steps the engine itself, to see Ctrl-C between the chunks of a long prompt too."""
        request_id = f"chat-{len(self._messages)}"
        self._engine.submit(request_id, prompt, self._params)
        try:
            while self._engine.has_work() and not ctrl_c.pressed:
                # An earlier answer that was stopped has its last delta in the next step.
                yield from (d for d in self._engine.step() if d.request_id == request_id)
        finally:
            self._engine.cancel(request_id)


class _Interrupts:
    """While entered, a first Ctrl-C only sets `pressed`; a second one is an interrupt as usual.

    The engine must not be left in the middle of a step, so the answer ends between two tokens.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._previous: Any = None

    def __enter__(self) -> _Interrupts:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *details: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


def _lines() -> Iterator[str]:
    """The user's lines; Ctrl-C at the prompt of a terminal starts the line again."""
    if not sys.stdin.isatty():
        # Not `for line in stdin`, which reads ahead: a Ctrl-C would take later messages with it.
        while line := sys.stdin.readline():
            yield line.rstrip("\n")
        return
    with suppress(ImportError):  # arrow keys and history, where the platform has it
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            say("\n/exit or Ctrl-D leaves")

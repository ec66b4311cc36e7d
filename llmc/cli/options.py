"""Arguments and options that several commands have, and what they become."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmc.errors import UsageError

if TYPE_CHECKING:
    from llmc.runtime.engine import Engine
    from llmc.runtime.sampling_params import SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])

artifact_argument = click.argument(
    "directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path)
)
device_option = click.option(
    "--device",
    metavar="KIND[:INDEX]",
    show_default="the artifact's",
    help="Such as cpu or vulkan:1.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
kv_cache_option = click.option(
    "--kv-cache-tokens",
    type=click.IntRange(min=1),
    show_default="what the memory allows",
    help="Tokens the KV cache holds, over all sequences.",
)


def sampling_options(*, max_tokens: int, temperature: float) -> Callable[[Command], Command]:
    """Options of llmc.runtime.sampling_params.SamplingParams, which checks their ranges.

    Those that a model can state itself are None where they are not given; `temperature` is only
    shown here, `sampling_params` sets it.
    """

    def of_model(name: str, type_: type, otherwise: float, text: str) -> Callable[..., Any]:
        default = f"the model's, or {otherwise:g}"
        return click.option(name, type=type_, show_default=default, help=text)

    options = (
        click.option("--max-tokens", "-n", default=max_tokens, help="Most tokens to generate."),
        of_model("--temperature", float, temperature, "0 takes the likeliest token."),
        of_model("--top-k", int, 0, "Sample from the k likeliest tokens; 0 from all."),
        of_model("--top-p", float, 1, "Sample from the likeliest share p."),
        of_model("--min-p", float, 0, "Drop tokens below this share of the likeliest."),
        click.option("--seed", type=int, help="Makes sampling repeatable.  [default: random]"),
        of_model("--repetition-penalty", float, 1, "Above 1 discourages repetition."),
        click.option("--presence-penalty", default=0.0, help="-2 to 2, for tokens used before."),
        click.option("--frequency-penalty", default=0.0, help="-2 to 2, per use before."),
        click.option("--stop", multiple=True, help="Text that ends the answer; repeatable."),
        click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token."),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def given_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `sampling_options` that were given; UsageError where one is out of range.

    Needs no engine, so that a wrong option does not cost the time to load one.
    """
    from llmc.errors import RequestError
    from llmc.runtime.sampling_params import SamplingParams

    given = {name: value for name, value in options.items() if value is not None}
    try:
        SamplingParams(**given)
    except RequestError as exc:
        option = f"--{exc.param.replace('_', '-')}" if exc.param else "sampling options"
        raise UsageError(f"{option}: {exc.message}", hint=exc.hint) from exc
    return given


def sampling_params(engine: Engine, given: dict[str, Any], *, temperature: float) -> SamplingParams:
    """What was given; else what the model states; else `temperature` and the engine's defaults."""
    return engine.default_sampling(
        **{"temperature": temperature, **engine.sampling_defaults, **given}
    )


def open_engine(directory: Path, **options: Any) -> Engine:  # noqa: ANN401 - the engine's options
    """Loads an artifact, with a spinner on stderr where a terminal is there to show it."""
    from llmc.cli.console import working

    # What is loaded stays: looking for garbage in it takes 20 ms now, and again in every full
    # collection and before the interpreter exits, 50 ms.
    gc.disable()
    try:
        from llmc.runtime.engine import Engine

        with working(f"loading {directory}"):
            return Engine(directory, **options)
    finally:
        gc.freeze()
        gc.enable()

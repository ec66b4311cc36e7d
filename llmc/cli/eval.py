"""`llmc eval`: how well an artifact predicts a text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from llmc.cli.console import print_json, working
from llmc.cli.options import artifact_argument, device_option, json_option, open_engine
from llmc.errors import UsageError


@click.command("eval")
@artifact_argument
@click.option(
    "--text",
    "text_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A UTF-8 text to score.",
)
@click.option("--window", default=512, help="Tokens of one window; its second half is scored.")
@device_option
@json_option
def eval_command(
    directory: Path, text_file: Path, window: int, device: str | None, as_json: bool
) -> None:
    """Measure perplexity and bits per byte on a text.

    The text is cut into windows that do not overlap, and the second half of each is scored, as
    llama.cpp does; figures of the two compare.
    """
    try:
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{text_file}: not UTF-8 at byte {exc.start}") from exc
    from llmc.cli.perplexity import perplexity

    engine = open_engine(directory, device=device, kv_cache_tokens=window + 64)
    with working("scoring") as update:
        result = perplexity(
            engine,
            text,
            window=window,
            on_window=lambda done, of: update(f"scoring: window {done} of {of}"),
        )
    if as_json:
        print_json(
            {
                "model": engine.manifest.model.name,
                "quantization": engine.manifest.quantization,
                "text": str(text_file),
                "window": window,
                **dataclasses.asdict(result),
            }
        )
        return
    click.echo(
        f"perplexity {result.perplexity:.4f} ± {result.standard_error:.4f}, "
        f"{result.bits_per_byte:.4f} bits per byte "
        f"({result.num_scored_tokens} tokens in {result.num_windows} windows of {window})"
    )

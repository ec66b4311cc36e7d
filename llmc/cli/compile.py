"""`llmc compile`: a model becomes an artifact folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmc.cli.console import console, format_bytes, format_seconds, print_json, say
from llmc.cli.options import json_option
from llmc.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from llmc.compiler.compile import CompileResult
    from llmc.compiler.phases import PhaseEvent

_COMPILE_EXTRA = ("accelerate", "gguf", "huggingface_hub", "onnx", "torch", "transformers")


@click.command("compile")
@click.argument("source")
@click.option("--target", default="cpu", help="Device to compile for; `llmc targets` lists them.")
@click.option(
    "--quant",
    default="f32",
    help="Weight format: f32, f16, w8a16, w4a16-g32, … or keep, the source's own.",
)
@click.option(
    "--calibrate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A UTF-8 text like those to be served: 4-bit codes are chosen by it, not by rounding.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="dist/NAME-QUANT-TARGET",
    help="Artifact folder to write.",
)
@click.option("--name", show_default="from SOURCE", help="Model name that servers answer to.")
@click.option("--force", is_flag=True, help="Overwrite an existing artifact folder.")
@click.option(
    "--dump-ir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the IR after each phase.",
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(min=1),
    default=512,
    help="Most tokens of one step, over all sequences.",
)
@click.option(
    "--max-sequences", type=click.IntRange(min=1), default=32, help="Most sequences of one step."
)
@click.option(
    "--context",
    "context_length",
    type=click.IntRange(min=1),
    show_default="the model's",
    help="Most tokens of one sequence.",
)
@click.option(
    "--kv", show_default="the target's", help="Type of the KV cache: f32, f16, bf16, int8."
)
@click.option(
    "--no-weights",
    "weights",
    flag_value=False,
    default=True,
    show_default=False,
    help="Compile from the config alone, for `llmc inspect` and `llmc bench --random-weights`.",
)
@json_option
def compile_command(source: str, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Compile SOURCE into an artifact folder and print the folder.

    SOURCE is a Hugging Face folder, a .gguf file, a Hugging Face id (org/name), or demo:smollm2.
    """
    with _compile_extra(), _PhaseReporter() as reporter:
        from llmc.compiler.compile import compile_model

        result = compile_model(source, on_phase=reporter.on_phase, **options)
    if as_json:
        print_json(_as_json(result))
        return
    for note in result.notes:
        say(f"note: {note}")
    memory = result.manifest.memory
    say(
        f"compiled in {format_seconds(result.seconds)}: weights "
        f"{format_bytes(memory.weights_bytes)}, {memory.kv_bytes_per_token} bytes of KV per token"
    )
    click.echo(str(result.path))


@contextmanager
def _compile_extra() -> Iterator[None]:
    """Answers a missing package of the compile side with the command that brings it."""
    try:
        yield
    except ModuleNotFoundError as exc:
        package = (exc.name or "").partition(".")[0]
        if package not in _COMPILE_EXTRA:
            raise
        raise UsageError(
            f"compiling needs {package}, which is not installed",
            hint='pip install "llmc[compile]"',
        ) from exc


def _as_json(result: CompileResult) -> dict[str, Any]:
    files = [path for path in result.path.rglob("*") if path.is_file()]
    manifest = result.manifest
    return {
        "path": str(result.path),
        "model": manifest.model.name,
        "quantization": manifest.quantization,
        "target": manifest.variants[0].target if manifest.variants else None,
        "seconds": result.seconds,
        "notes": result.notes,
        "phases": [{"name": name, "seconds": seconds} for name, seconds in result.phases],
        "artifact_bytes": sum(path.stat().st_size for path in files),
        "weights_bytes": manifest.memory.weights_bytes,
        "workspace_bytes": manifest.memory.workspace_bytes,
        "thread_bytes": manifest.memory.thread_bytes,
        "kv_bytes_per_token": manifest.memory.kv_bytes_per_token,
    }


class _PhaseReporter:
    """Shows phases on stderr: a live line on a terminal, one line a finished phase everywhere."""

    def __init__(self) -> None:
        self._console = console(err=True)
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> _PhaseReporter:
        if self._console.is_terminal:
            from rich.progress import (
                BarColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._progress = self._stack.enter_context(
                Progress(
                    SpinnerColumn(),
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    console=self._console,
                    transient=True,
                )
            )
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def on_phase(self, event: PhaseEvent) -> None:
        """Takes one event of the compiler."""
        label = f"{event.name}: {event.detail}" if event.detail else event.name
        if self._progress is not None:
            self._show(event, label)
        if event.status == "done":
            line = f"{event.name:<28} {format_seconds(event.seconds):>10}  {event.detail}"
            self._console.print(line.rstrip(), markup=False)

    def _show(self, event: PhaseEvent, label: str) -> None:
        assert self._progress is not None
        if event.status == "start":
            self._task = self._progress.add_task(label, total=None)
        elif event.status == "progress" and self._task is not None:
            total = None if event.fraction is None else 1.0
            self._progress.update(
                self._task, description=label, total=total, completed=event.fraction or 0.0
            )
        elif event.status == "done" and self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None

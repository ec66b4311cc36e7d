"""What the command lines here share: their options, and how they end."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from llmc.errors import LlmcError

cache_option = click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path.home() / ".cache" / "llmc-bench",
    show_default="~/.cache/llmc-bench",
    help="Where programs and models are kept.",
)
llama_cpp_option = click.option(
    "--llama-cpp",
    "peer_folder",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="LLMC_BENCH_LLAMA_CPP",
    help="Folder of llama.cpp's programs, built elsewhere.  [env: LLMC_BENCH_LLAMA_CPP]",
)


def explained(command: click.Command, name: str) -> None:
    """Runs a command; Ctrl-C and being told to end keep what was measured."""
    # Being told to end is no reason to lose what was measured, or to leave a program running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command.main(prog_name=name, standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except LlmcError as exc:
        click.echo(f"error: {exc}", err=True)
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: what was measured until now is kept", err=True)
        sys.exit(130)

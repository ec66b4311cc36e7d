"""The `llmc` command: its sub-commands, and the one place that turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections import UserDict
from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast

import click

from llmc import __version__
from llmc.errors import CompileError, LlmcError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_TERMINATED = 143  # 128 + SIGTERM
EXIT_BUG = 70  # EX_SOFTWARE


class _Commands(UserDict[str, Any]):
    """Commands by name, each imported (from `module:name`) when it is asked for."""

    def __getitem__(self, name: str) -> click.Command:
        command = self.data[name]
        if isinstance(command, str):
            module, attribute = command.split(":")
            command = self.data[name] = getattr(import_module(module), attribute)
        return cast("click.Command", command)


@click.group(
    commands=_Commands(
        bench="llmc.cli.bench:bench",
        chat="llmc.cli.chat:chat",
        compile="llmc.cli.compile:compile_command",
        eval="llmc.cli.eval:eval_command",
        inspect="llmc.cli.inspect:inspect",
        run="llmc.cli.run:run",
        serve="llmc.cli.serve:serve",
        targets="llmc.cli.targets:targets",
        verify="llmc.cli.verify:verify_command",
    ),
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="llmc")
def cli() -> None:
    """Compile any language model once, serve it anywhere.

    Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 wrong usage, 3 unreadable
    model, 4 unsupported model, 5 failed compilation, 6 damaged artifact, 7 failed verification,
    8 not enough memory, 9 malformed request, 70 a bug in llmc, 130 interrupted, 143 terminated.
    """


def main() -> None:
    """Entry point of the `llmc` script."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; no exception leaves."""
    try:
        code = cli.main(args=list(arguments), prog_name="llmc", standalone_mode=False)
        # What is still in the buffer must meet a closed pipe here, not in the interpreter's exit.
        sys.stdout.flush()
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except LlmcError as exc:
        if isinstance(exc, CompileError) and exc.__cause__ is not None and _debugging():
            raise
        _explain(exc.message, exc.hint)
        return exc.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # of the flush above
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except SystemExit as exc:
        if exc.code == EXIT_TERMINATED:  # a SIGTERM that was cleaned up after
            click.echo("terminated", err=True)
            return EXIT_TERMINATED
        # click's only exit in this mode: the pipe's reader has left, and there is nobody to tell.
        return EXIT_BROKEN_PIPE
    except Exception as exc:
        if _debugging():
            raise
        first = (str(exc).strip().splitlines() or [""])[0]  # TVM prints whole modules
        _explain(
            f"{type(exc).__name__}: {first[:400]}",
            "this is a bug in llmc; LLMC_DEBUG=1 shows where it happened",
        )
        return EXIT_BUG
    return code if isinstance(code, int) else 0


def _debugging() -> bool:
    return os.environ.get("LLMC_DEBUG") == "1"


def _explain(message: str, hint: str | None) -> None:
    # click colours for terminals only, but knows nothing of NO_COLOR (https://no-color.org).
    color = False if os.environ.get("NO_COLOR") else None
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True, color=color)
    if hint is not None:
        click.echo(f"{click.style('hint:', fg='cyan')} {hint}", err=True, color=color)


if __name__ == "__main__":
    main()

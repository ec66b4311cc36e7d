"""How the command lines here end: deliberate errors are explained."""

from __future__ import annotations

import signal
import sys

import click

from llmc.errors import LlmcError


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

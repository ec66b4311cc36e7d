"""What the commands share in talking: consoles, JSON and units."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 200  # columns of a table that no terminal bounds


def console(*, err: bool = False) -> Console:
    """A rich console on stdout (data) or stderr (talk); plain on a pipe and under NO_COLOR."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else _PIPE_WIDTH)


@contextmanager
def working(message: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while the block runs, where a terminal is there to show it.

    Gives what changes its message.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with console(err=True).status(message) as status:
        yield status.update


def say(message: str) -> None:
    """One line of talk on stderr."""
    click.echo(message, err=True)


def print_json(value: object) -> None:
    """One JSON document on stdout; NaN is refused, because JSON has none."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def table(*columns: str, title: str | None = None) -> Table:
    """A rich table; columns whose name begins with `>` are aligned to the right."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        result.add_column(column.removeprefix(">"), justify="right" if column[0] == ">" else "left")
    return result


def format_bytes(num_bytes: int) -> str:
    """With a binary unit: `86.3 MiB`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """With a unit fit for its size: `820 ms`, `12.4 s`, `3 min 05 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def printable(text: str) -> str:
    """`text` as a terminal may see it: escape sequences that a model wrote must not act on it."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)

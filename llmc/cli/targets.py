"""`llmc targets`: what this machine can compile for and run."""

from __future__ import annotations

import dataclasses

import click

from llmc.cli.console import console, print_json, table
from llmc.cli.options import json_option


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the targets and what each lacks on this machine."""
    from llmc.targets.registry import list_targets

    found = list_targets()
    if as_json:
        print_json({"targets": [dataclasses.asdict(target) for target in found]})
        return
    rows = table("target", "compile", "run", "notes")
    for target in found:
        notes = "; ".join([*target.reasons, *([target.hint] if target.hint else [])])
        rows.add_row(target.name, _yes(target.can_build), _yes(target.can_run), notes)
    console().print(rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"

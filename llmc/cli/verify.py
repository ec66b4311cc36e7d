"""`llmc verify`: the artifact proves its numbers on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmc.cli.console import console, print_json, say, table, working
from llmc.cli.options import artifact_argument, device_option, json_option

if TYPE_CHECKING:
    from llmc.runtime.verify import Figures, VerifyReport


@click.command("verify")
@artifact_argument
@device_option
@json_option
def verify_command(directory: Path, device: str | None, as_json: bool) -> None:
    """Compare the artifact's log-probabilities on this machine with those of the model itself.

    The reference was computed at compile time; every entry point is checked against it. Exit code 7
    if the numbers are wrong or the artifact has no reference.
    """
    from llmc.runtime.verify import verify

    with working(f"verifying {directory}"):
        report = verify(directory, device=device)
    if as_json:
        print_json(report.to_json())
    elif report.made:
        _print_report(report)
    report.raise_if_failed()
    say("passed")


def _print_report(report: VerifyReport) -> None:
    rows = table("prompt", "entry point", ">positions", ">mean |Δ|", ">max |Δ|", ">KL", ">top-1")
    for prompt in report.prompts:
        rows.add_row(str(prompt.prompt), prompt.entry_point, *_cells(prompt.figures))
    if report.total is not None:
        rows.add_section()
        rows.add_row("all", "", *_cells(report.total))
    tolerance = report.tolerance
    rows.add_row(
        "allowed", "", "", f"{tolerance.max_mean_abs:.2e}", f"{tolerance.max_abs:.2e}", "", ""
    )
    if report.quality is not None:
        rows.add_section()
        rows.add_row("original weights", "", *_cells(report.quality))
    console().print(rows)
    say("Δ: log-probability of the reference's likeliest token, nats; KL in nats")


def _cells(figures: Figures) -> tuple[str, ...]:
    return (
        str(figures.num_positions),
        f"{figures.mean_abs:.2e}",
        f"{figures.max_abs:.2e}",
        f"{figures.kl:.2e}",
        f"{figures.top1_agreement:.1%}",
    )

"""`python -m benchmarks.gpu DIR …`: checks artifacts on this machine's GPU, then measures them.

For machines that have the runtime alone: nothing is compiled. An artifact whose weight files did
not travel is measured with made-up ones and not checked. Where torch is installed, its matrix
product and the copy bandwidth stand beside, as what the device can do.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from llmc.artifact import Manifest
from llmc.cli.console import console, say, table


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument(
    "directories",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--device", metavar="KIND[:INDEX]", help="Device to run on.")
@click.option("--prompt-tokens", default=512, help="Tokens of each prompt.")
@click.option("--gen-tokens", default=128, help="Tokens each sequence generates.")
@click.option("--batch", "batches", default="1,16", help="Batch sizes to measure.")
@click.option("--repeat", default=3, help="Measurements a batch size.")
@click.option("--json", "record", type=click.Path(path_type=Path), help="Also write all figures.")
def main(directories: tuple[Path, ...], record: Path | None, **plan: Any) -> None:  # noqa: ANN401
    """Verify every artifact, measure it, and print one table."""
    figures = [_measure(directory, **plan) for directory in directories]
    limits = _limits()
    if limits:
        say(
            f"{limits['device']}: {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s copied (read and "
            f"written), {limits['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s in an 8192³ bf16 product"
        )
    _print(figures)
    if record is not None:
        record.write_text(json.dumps({"limits": limits, "artifacts": figures}, indent=1) + "\n")


def _measure(
    directory: Path,
    *,
    device: str | None,
    prompt_tokens: int,
    gen_tokens: int,
    batches: str,
    repeat: int,
) -> dict[str, Any]:
    manifest = Manifest.load(directory)
    complete = all((directory / weight.file).exists() for weight in manifest.weights)
    on = [] if device is None else ["--device", device]
    verified = _llmc(["verify", str(directory), *on]) if complete else None
    plan = ["--prompt-tokens", str(prompt_tokens), "--gen-tokens", str(gen_tokens)]
    plan += ["--batch", batches, "--repeat", str(repeat), *on]
    bench = _llmc(["bench", str(directory), *plan, *([] if complete else ["--random-weights"])])
    return {"name": directory.name, "verify": verified, "bench": bench}


def _llmc(arguments: list[str]) -> dict[str, Any]:
    """The JSON object a command prints, or the end of what it said on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "llmc.cli.main", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"error": done.stderr.strip()[-400:], "exit_code": done.returncode}
    return found


def _limits() -> dict[str, Any]:
    """What torch reaches on the device; nothing without torch or a GPU."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))

    def seconds(run: Any, times: int) -> float:  # noqa: ANN401 - a function
        for _ in range(3):
            run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / times

    return {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_s": 2 * (1 << 30) / seconds(lambda: target.copy_(source), 10),
        "bf16_flop_per_s": 2 * 8192**3 / seconds(lambda: matrix @ matrix, 10),
    }


def _print(figures: list[dict[str, Any]]) -> None:
    rows = table(
        "artifact",
        ">mean |Δ|",
        ">top-1",
        ">batch",
        ">prefill tokens/s",
        ">decode tokens/s",
        ">of bandwidth",
    )
    for figure in figures:
        verified, bench = figure["verify"], figure["bench"]
        checked = ["", ""]
        if verified is not None:
            total = verified.get("total")
            checked = (
                [f"{total['mean_abs']:.1e}", f"{total['top1_agreement']:.1%}"]
                if total
                else ["failed", ""]
            )
        for problem in (verified, bench):
            if problem is not None and "error" in problem:
                say(f"{figure['name']}: {problem['error']}")
        for number, result in enumerate(bench.get("results", [])):
            rows.add_row(
                *([figure["name"], *checked] if number == 0 else ["", "", ""]),
                str(result["batch"]),
                *(_cell(result[f"{name}_tokens_per_s"]) for name in ("prefill", "decode")),
                f"{result['memory_bandwidth_share']['median']:.0%}",
            )
    console().print(rows)


def _cell(value: dict[str, float]) -> str:
    return f"{value['median']:,.0f} ({value['min']:,.0f} … {value['max']:,.0f})"


if __name__ == "__main__":
    main()

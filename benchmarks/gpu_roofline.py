"""`python -m benchmarks.gpu_roofline RECORD OUT`: whole steps of `benchmarks.gpu --json`, drawn.

Names of artifacts begin with a shape of benchmarks.gpu_peers. A step counts two operations for each
weight of a product and token, and the bytes that docs/benchmarks/h200.md calls its floor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu_peers import COMMON, SHAPES
from benchmarks.plots import plot_points

_BYTES = {"bf16": (2.0, 2.0), "w4a16-g128": (0.5 + 2 / 128, 1.0)}
"""Of a weight of the layers, and of the output projection."""


@click.command()
@click.argument("record", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def main(record: Path, out: Path) -> None:
    """Print each step's share of its floor, and draw all of them to OUT."""
    found = json.loads(record.read_text())
    limits = found["limits"]
    bandwidth, peak = limits["copy_bytes_per_s"], limits["bf16_flop_per_s"]
    series: dict[str, list[tuple[float, float, str]]] = {}
    for artifact in found["artifacts"]:
        name, bench = artifact["name"], artifact["bench"]
        shape, _, quant = name.partition("-")
        layers, head = _weights(SHAPES[shape])
        weight_bytes, head_bytes = _BYTES[quant]
        context = bench["prompt_tokens"] + bench["gen_tokens"] / 2
        for result in bench["results"]:
            batch = result["batch"]
            num_bytes = layers * weight_bytes + head * head_bytes
            num_bytes += batch * context * bench["kv_bytes_per_token"]
            seconds = batch / result["decode_tokens_per_s"]["median"]
            operations = 2 * (layers + head) * batch
            click.echo(f"{name} batch {batch}: {num_bytes / bandwidth / seconds:.0%} of the floor")
            point = (operations / num_bytes, operations / seconds, f"batch {batch}")
            series.setdefault(f"decode, {name}", []).append(point)
        best = max(r["prefill_tokens_per_s"]["median"] for r in bench["results"])
        tokens = 2048  # of a step
        intensity = 2 * layers * tokens / (layers * weight_bytes)
        series.setdefault("prefill, 2,048 tokens", []).append((intensity, 2 * layers * best, name))
    title = f"Whole steps on an {limits['device']}: products of bf16"
    plot_points(title, series, bandwidth, peak, out)


def _weights(shape: dict[str, Any]) -> tuple[int, int]:
    """Of all layers' products, and of the output projection."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads = COMMON["num_attention_heads"], COMMON["num_key_value_heads"]
    head_dim = shape.get("head_dim", width // heads)
    attention = (heads + kv_heads) * 2 * head_dim * width
    layer = attention + 3 * width * inner
    return layer * shape["num_hidden_layers"], COMMON["vocab_size"] * width


if __name__ == "__main__":
    main()

"""`llmc inspect`: what an artifact is and needs, read from its manifest alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from llmc.artifact import Manifest
from llmc.cli.console import console, format_bytes, print_json, table
from llmc.cli.options import artifact_argument, json_option


@click.command()
@artifact_argument
@json_option
def inspect(directory: Path, as_json: bool) -> None:
    """Show model, target, quantization, memory, entry points and kernels of an artifact."""
    manifest = Manifest.load(directory)
    if as_json:
        print_json(_summary(manifest))
    else:
        _print(manifest)


def _summary(manifest: Manifest) -> dict[str, Any]:
    model, memory = manifest.model, manifest.memory
    return {
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "num_parameters": model.num_parameters,
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "vocab_size": model.vocab_size,
            "context_length": model.context_length,
        },
        "targets": [
            {"target": v.target, "device_kind": v.device_kind, "features": v.features}
            for v in manifest.variants
        ],
        "quantization": manifest.quantization,
        "compute_dtype": manifest.compute_dtype,
        "activation_dtype": manifest.activation_dtype,
        "kv_dtype": manifest.kv_dtype,
        "weights_bytes": memory.weights_bytes,
        "weights_bytes_by_format": _bytes_by_format(manifest),
        "workspace_bytes": memory.workspace_bytes,
        "thread_bytes": memory.thread_bytes,
        "logits_bytes": memory.logits_bytes,
        "sampling": "host" if manifest.sampling is None else "device",
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "max_batch_tokens": manifest.max_batch_tokens,
        "max_sequences": manifest.max_sequences,
        "entry_points": [
            {
                "name": e.name,
                "max_tokens": e.max_tokens,
                "max_sequences": e.max_sequences,
                "max_logits_rows": e.max_logits_rows,
                "workspace_bytes": e.workspace_bytes,
            }
            for e in manifest.entry_points
        ],
        "kernels": [
            {"name": k.name, "rule": k.rule, "num_calls": k.num_calls} for k in manifest.kernels
        ],
        "llmc_version": manifest.llmc_version,
        "tvm_version": manifest.tvm_version,
        "created": manifest.created,
    }


def _bytes_by_format(manifest: Manifest) -> dict[str, int]:
    total: Counter[str] = Counter()
    for weight in manifest.weights:
        total[weight.format] += weight.num_bytes
    return dict(total.most_common())


def _print(manifest: Manifest) -> None:
    out, model, memory = console(), manifest.model, manifest.memory
    formats = ", ".join(f"{n} {format_bytes(b)}" for n, b in _bytes_by_format(manifest).items())
    rows = [
        ("model", f"{model.name} ({model.architecture})"),
        ("parameters", f"{model.num_parameters / 1e6:,.1f} M in {model.num_layers} layers"),
        ("context", f"{model.context_length} tokens, vocabulary {model.vocab_size}"),
    ]
    for variant in manifest.variants:
        features = ", ".join(variant.features) or "no features"
        rows.append(("target", f"{variant.target} (needs {features})"))
    rows += [
        ("quantization", f"{manifest.quantization}, products with {manifest.activation_dtype}"),
        ("weights", f"{format_bytes(memory.weights_bytes)} ({formats})"),
        (
            "workspace",
            f"{format_bytes(memory.workspace_bytes)}, "
            f"and {format_bytes(memory.thread_bytes)} on each thread",
        ),
        ("logits", format_bytes(memory.logits_bytes)),
        ("sampling", "on the host" if manifest.sampling is None else "on the device"),
        ("KV cache", f"{format_bytes(memory.kv_bytes_per_token)} a token, {manifest.kv_dtype}"),
        (
            "compiled",
            f"{manifest.created} by llmc {manifest.llmc_version}, TVM {manifest.tvm_version}",
        ),
    ]
    for name, value in rows:
        click.echo(f"{name:<14}{value}")
    entries = table("entry point", ">tokens", ">sequences", ">logits rows", ">workspace")
    for e in manifest.entry_points:
        entries.add_row(
            e.name,
            str(e.max_tokens),
            str(e.max_sequences),
            str(e.max_logits_rows),
            format_bytes(e.workspace_bytes),
        )
    out.print(entries)
    kernels = table("kernel", "rule", ">calls")
    for kernel in sorted(manifest.kernels, key=lambda k: (-k.num_calls, k.name)):
        kernels.add_row(kernel.name, kernel.rule, str(kernel.num_calls))
    out.print(kernels)

"""`llmc bench`: how fast an artifact is on this machine, with everything needed to repeat it."""

from __future__ import annotations

import dataclasses
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from llmc import __version__
from llmc.cli.console import console, format_bytes, print_json, say, table, working
from llmc.cli.options import artifact_argument, device_option, json_option, open_engine
from llmc.errors import UsageError

if TYPE_CHECKING:
    from llmc.cli.benchmark import Measurement
    from llmc.runtime.engine import Engine
    from llmc.runtime.executor import Executor

_FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "inter_token_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class _MeasuredBatch:
    """One batch size's measured runs; the peak is the process's until their end."""

    batch: int
    measurements: list[Measurement]
    peak_memory_mib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is run for every batch size."""

    prompt_tokens: int
    gen_tokens: int
    warm_up: int
    repeat: int


@click.command()
@artifact_argument
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=512, help="Tokens of each prompt."
)
@click.option(
    "--gen-tokens", type=click.IntRange(min=2), default=128, help="Tokens each sequence generates."
)
@click.option("--batch", "batches", default="1,4,16", help="Batch sizes to measure.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, help="Measurements a batch size.")
@click.option(
    "--warm-up", type=click.IntRange(min=0), default=1, help="Runs before them, not measured."
)
@click.option(
    "--profile", is_flag=True, help="Show each kernel's time and what it takes at least, instead."
)
@click.option(
    "--random-weights", is_flag=True, help="Make weights up: the artifact's may be missing."
)
@device_option
@json_option
def bench(
    directory: Path,
    batches: str,
    device: str | None,
    profile: bool,
    random_weights: bool,
    as_json: bool,
    **plan: int,
) -> None:
    """Measure prefill and decode speed with random prompts, all sequences of a batch at once."""
    report = (_profile if profile else _report)(
        directory, _parse_batches(batches), _Plan(**plan), device, random_weights
    )
    if as_json:
        print_json(report)
    elif profile:
        _print_profile(report)
    else:
        _print(report)


def _kv_cache_tokens(sizes: list[int], plan: _Plan) -> int:
    # The margin is for the last, partly filled page of each sequence.
    return max(sizes) * (plan.prompt_tokens + plan.gen_tokens + 64)


def _profile(
    directory: Path, sizes: list[int], plan: _Plan, device: str | None, random_weights: bool
) -> dict[str, Any]:
    from llmc.cli.profile import Profiler, device_limits, measure_limits
    from llmc.runtime.engine import Engine
    from llmc.runtime.load import load_model

    with working(f"loading {directory}"):
        model = load_model(
            directory,
            device=device,
            kv_cache_tokens=_kv_cache_tokens(sizes, plan),
            max_batch_tokens=None,
            max_sequences=None,
            random_weights=random_weights,
        )
    executor = cast("Executor", model.executor)  # what the loader makes
    profiler = Profiler(executor, model.manifest)
    engine = Engine.from_parts(model.manifest, profiler, num_pages=model.num_pages)
    _check_fits(engine, sizes, plan)
    if plan.warm_up:
        _measure_batch(engine, min(sizes), dataclasses.replace(plan, repeat=1, warm_up=0))
        profiler.forget()
    measured = dataclasses.replace(plan, warm_up=0)
    for batch in sizes:
        _measure_batch(engine, batch, measured)
        with profiler.instrumented():
            _measure_batch(engine, batch, measured)
    own_memory = _own_memory(engine, device)
    limits = measure_limits() if own_memory is None else device_limits(own_memory)
    return {
        "command": shlex.join(["llmc", *sys.argv[1:]]),
        **_setting(engine, device),
        **dataclasses.asdict(plan),
        "limits": dataclasses.asdict(limits),
        "empty_call_us": profiler.empty_call_ns / 1000,
        "steps": profiler.report(sizes, limits),
    }


def _report(
    directory: Path, sizes: list[int], plan: _Plan, device: str | None, random_weights: bool
) -> dict[str, Any]:
    from llmc.cli.bandwidth import COPY_METHOD, METHOD, copy_bandwidth, read_bandwidth

    engine = open_engine(
        directory,
        device=device,
        kv_cache_tokens=_kv_cache_tokens(sizes, plan),
        random_weights=random_weights,
    )
    _check_fits(engine, sizes, plan)
    measured = [_measure_batch(engine, batch, plan) for batch in sizes]
    # Last, because its buffers would be in every figure of peak memory.
    own_memory = _own_memory(engine, device)
    bytes_per_s = read_bandwidth() if own_memory is None else copy_bandwidth(own_memory)
    return {
        "command": shlex.join(["llmc", *sys.argv[1:]]),
        **_setting(engine, device),
        **dataclasses.asdict(plan),
        "read_bandwidth_bytes_per_s": bytes_per_s,
        "read_bandwidth_method": METHOD if own_memory is None else COPY_METHOD,
        "results": [_result(engine, batch, bytes_per_s) for batch in measured],
    }


def _own_memory(engine: Engine, device: str | None) -> Any:  # noqa: ANN401 - tvm_ffi's device
    """The device that the engine runs on, None where it computes in the host's memory."""
    from llmc.runtime.devices import choose_place
    from llmc.runtime.tvm_runtime import tvm_ffi

    place = choose_place(engine.manifest, device)
    if place.device.is_host:
        return None
    return tvm_ffi().device(place.device.tvm_name, place.index)


def _parse_batches(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(
            f"--batch: {text[:60]!r} is no list of batch sizes", hint="for example --batch 1,4,16"
        )
    return sizes


def _check_fits(engine: Engine, sizes: list[int], plan: _Plan) -> None:
    manifest = engine.manifest
    num_tokens = plan.prompt_tokens + plan.gen_tokens
    if max(sizes) > manifest.max_sequences:
        raise UsageError(
            f"--batch: {max(sizes)} sequences, the artifact takes {manifest.max_sequences} a step",
            hint="compile with a larger --max-sequences",
        )
    if num_tokens > manifest.model.context_length:
        raise UsageError(
            f"{num_tokens} tokens of prompt and answer exceed the context of "
            f"{manifest.model.context_length}",
            hint="lower --prompt-tokens or --gen-tokens",
        )


def _setting(engine: Engine, device: str | None) -> dict[str, Any]:
    from llmc.cpu_features import num_cores

    manifest = engine.manifest
    return {
        "model": manifest.model.name,
        "quantization": manifest.quantization,
        "llmc_version": __version__,
        "tvm_version": manifest.tvm_version,
        "device": device or manifest.variants[0].device_kind,
        "machine": f"{platform.system()} {platform.machine()}, {cpu_name()}, {num_cores()} CPUs",
        "weights_bytes": manifest.memory.weights_bytes,
        "kv_bytes_per_token": manifest.memory.kv_bytes_per_token,
    }


def cpu_name() -> str:
    """The processor, as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _measure_batch(engine: Engine, batch: int, plan: _Plan) -> _MeasuredBatch:
    from llmc.cli.benchmark import measure, peak_memory_mib

    runs = []
    num_runs = plan.warm_up + plan.repeat
    with working(f"batch {batch}") as update:
        for index in range(num_runs):
            update(f"batch {batch}: run {index + 1} of {num_runs}")
            run = measure(
                engine, batch=batch, prompt_tokens=plan.prompt_tokens, gen_tokens=plan.gen_tokens
            )
            runs.append(run)
    return _MeasuredBatch(
        batch=batch, measurements=runs[plan.warm_up :], peak_memory_mib=peak_memory_mib()
    )


def _result(engine: Engine, measured: _MeasuredBatch, bytes_per_s: float) -> dict[str, Any]:
    from llmc.cli.benchmark import bandwidth_share, spread

    memory = engine.manifest.memory
    shares = [
        bandwidth_share(m, memory, batch=measured.batch, bytes_per_s=bytes_per_s)
        for m in measured.measurements
    ]
    return {
        "batch": measured.batch,
        **{name: spread([getattr(m, name) for m in measured.measurements]) for name in _FIGURES},
        "memory_bandwidth_share": spread(shares),
        "peak_memory_mib": measured.peak_memory_mib,
    }


def _say_setting(report: dict[str, Any]) -> None:
    say(
        f"$ {report['command']}\n"
        f"{report['model']} {report['quantization']} on {report['device']}: {report['machine']}\n"
        f"llmc {report['llmc_version']}, TVM {report['tvm_version']}; prompts of "
        f"{report['prompt_tokens']} random tokens, {report['gen_tokens']} generated; "
        f"{report['warm_up']} warm-up, n = {report['repeat']}: median (min … max)"
    )


def _print_profile(report: dict[str, Any]) -> None:
    from llmc.cli.profile import print_steps

    _say_setting(report)
    limits = report["limits"]
    peaks = ", ".join(f"{n} {v / 1e9:.0f}" for n, v in limits["operations_per_s"].items())
    say(
        f"memory reads {limits['memory_bytes_per_s'] / 1e9:.1f} GB/s, shared caches "
        f"{limits['cache_bytes_per_s'] / 1e9:.1f} GB/s; Gop/s by factors: {peaks}\n"
        f"floor: the longest of weights and KV from memory, activations from the caches, and "
        f"operations at their peak\nmedians of single calls; a call that does nothing reads as "
        f"{report['empty_call_us']:.1f} µs"
    )
    print_steps(report["steps"])


def _print(report: dict[str, Any]) -> None:
    _say_setting(report)
    say(
        f"weights {format_bytes(report['weights_bytes'])}; memory reads "
        f"{report['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s ({report['read_bandwidth_method']})"
    )
    rows = table(
        ">batch",
        ">prefill tokens/s",
        ">decode tokens/s",
        ">first token, ms",
        ">between tokens, ms",
        ">of bandwidth",
        ">peak memory, MiB",
    )
    for result in report["results"]:
        rows.add_row(
            str(result["batch"]),
            *(_cell(result[name]) for name in _FIGURES),
            f"{result['memory_bandwidth_share']['median']:.0%}",
            f"{result['peak_memory_mib']:.0f}",
        )
    console().print(rows)


def _cell(value: dict[str, float]) -> str:
    return f"{value['median']:.1f} ({value['min']:.1f} … {value['max']:.1f})"

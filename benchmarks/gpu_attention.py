"""`python -m benchmarks.gpu_attention`: attention of an H100 or H200 beside PyTorch's, in one run.

Llama 3.1 8B's heads in bfloat16: a prompt of 2,048 tokens, and single tokens of 1, 16 and 64
sequences behind 1,050 others. PyTorch takes its FlashAttention (`scaled_dot_product_attention`),
with keys and values that lie in one piece. Where there is no compiler, `--kernels` names what
`--build` wrote elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from llmc.cli.console import console, say, table
from llmc.runtime import tvm_runtime
from llmc.runtime.devices.cuda import Cuda

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
CASES = ((1, 2048, 2048), (4, 2048, 2048), (1, 1, 1050), (16, 1, 1050), (64, 1, 1050))
"""Sequences, new tokens of each, tokens that it has then."""
_CALLS = 30  # between two looks at the clock


@click.command(context_settings={"show_default": True})
@click.option("--kernels", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--build", type=click.Path(dir_okay=False, path_type=Path), help="Only compile.")
@click.option("--repeat", default=7, help="Measurements of each.")
def main(kernels: Path | None, build: Path | None, repeat: int) -> None:
    """Print microseconds a call, ours and PyTorch's, and the share of its rate."""
    if build is not None:
        _compile().export_library(str(build))
        return
    import torch

    if kernels is None:
        library = _compile()
    Cuda().prepare(0)
    if kernels is not None:
        library = tvm_runtime.tvm_ffi().load_module(str(kernels))
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; median of {repeat}, us a call")
    rows = table(">sequences", ">new tokens", ">context", ">ours", ">PyTorch", ">of its rate")
    for sequences, tokens, context in CASES:
        ours = _ours(library["attention"], sequences, tokens, context)
        theirs = _theirs(sequences, tokens, context)
        times = [[_microseconds(run) for _ in range(repeat)] for run in (ours, theirs)]
        medians = [statistics.median(t) for t in times]
        cells = [f"{statistics.median(t):.1f} ({min(t):.1f} … {max(t):.1f})" for t in times]
        counts = map(str, (sequences, tokens, context))
        rows.add_row(*counts, *cells, f"{medians[1] / medians[0]:.0%}")
    console().print(rows)


def _compile() -> Any:  # noqa: ANN401 - a module of TVM
    import tvm

    from llmc.targets.cuda.kernels import attention_decode
    from llmc.targets.cuda.kernels.attention import flash, flash_plan
    from llmc.targets.cuda.parameters import SHARED_KIB, DecodePlan
    from llmc.targets.cuda.target import CudaTarget
    from llmc.targets.gpu.kernels.attention import paged_attention

    target = CudaTarget("sm_90")
    shared = SHARED_KIB["sm_90"] * 1024
    plan = flash_plan(HEAD_DIM, HEAD_DIM, PAGE, "uint16", shared)
    assert plan is not None
    function = paged_attention(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        page_size=PAGE,
        kv_dtype="uint16",
        scale=HEAD_DIM**-0.5,
        window=None,
        softcap=None,
        sinks=False,
        group=0,
        num_groups=1,
        tokens=None,
        dtype="bfloat16",
        sink_dtype="float32",
        params=target.parameters,
        prefill=partial(flash, plan=plan),
        decode=partial(attention_decode.decode, plan=DecodePlan()),
    )
    named = tvm.IRModule({"attention": function.with_attr("global_symbol", "attention")})
    return tvm.compile(named, target=target.tvm_target)


def _bfloat16(*shape: int) -> Any:  # noqa: ANN401
    """Random numbers of size 1, as bits."""
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _ours(
    kernel: Callable[..., None], sequences: int, tokens: int, context: int
) -> Callable[[], None]:
    import ml_dtypes

    device = tvm_runtime.tvm_ffi().device("cuda", 0)
    blocks = -(-context // PAGE)
    pages = [_bfloat16(sequences * blocks, KV_HEADS, HEAD_DIM * PAGE) for _ in range(2)]
    query = _bfloat16(1, sequences * tokens, HEADS, HEAD_DIM).view(ml_dtypes.bfloat16)
    tables = np.arange(sequences * blocks, dtype=np.int32).reshape(1, sequences, blocks)
    starts = np.arange(sequences + 1, dtype=np.int32) * tokens
    lengths = np.full(sequences, context, np.int32)
    inputs = [query, starts, lengths, tables, *pages, np.zeros_like(query)]
    arguments = [tvm_runtime.copy_to(array, device) for array in inputs]
    return lambda: kernel(*arguments)


def _theirs(sequences: int, tokens: int, context: int) -> Callable[[], None]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def random(heads: int, length: int) -> Any:  # noqa: ANN401
        shape = (sequences, heads, length, HEAD_DIM)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    query, key, value = random(HEADS, tokens), random(KV_HEADS, context), random(KV_HEADS, context)

    def run() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            scaled_dot_product_attention(
                query, key, value, is_causal=tokens == context, enable_gqa=True
            )

    return run


def _microseconds(run: Callable[[], None]) -> float:
    """Of a call, one of many behind another; they are launched while the device sleeps."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    begin.record()
    for _ in range(_CALLS):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / _CALLS


if __name__ == "__main__":
    main()

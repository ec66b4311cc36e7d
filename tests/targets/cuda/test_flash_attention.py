"""Attention on tensor cores: its machine code here, its numbers where there is a GPU."""

import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm

from llmc import dialect
from llmc.cuda_toolkit import find_cudart
from llmc.targets.base import Site
from llmc.targets.cuda import toolkit
from llmc.targets.cuda.kernels import attention_decode
from llmc.targets.cuda.kernels.attention import flash, flash_bytes, flash_plan
from llmc.targets.cuda.parameters import FLASH_PLANS, SHARED_KIB, DecodePlan, FlashPlan
from llmc.targets.cuda.target import CudaTarget
from llmc.targets.gpu.kernels.attention import paged_attention
from llmc.targets.gpu.parameters import AttentionParameters, GpuParameters

sys.path.append(str(Path(__file__).parent.parent / "cpu"))
sys.path.append(str(Path(__file__).parent.parent / "gpu"))
from cuda_code import machine_code, sass_by_kernel
from gpu_pages import matrices, packed, page_shapes
from paged_reference import attention, make_batch

needs_nvcc = pytest.mark.skipif(
    toolkit.find_tool("cuobjdump") is None or find_cudart() is None,
    reason=toolkit.NVCC_HINT,
)
MIXED = ((1, 1), (1, 40), (1, 300), (0, 0), (5, 5), (70, 70), (33, 170), (2, 19), (0, 0))
LONG = ((300, 300), (129, 1000), (1, 700), (64, 64))
PARAMS = GpuParameters(attention=AttentionParameters(decode_parts=4))
ROOMY, SMALL = 163 * 1024, 99 * 1024


@dataclass(frozen=True, kw_only=True)
class Case:
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    v_head_dim: int = 64
    kv_dtype: str = "float16"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    group: int = 0
    num_groups: int = 1
    dtype: str = "float32"
    shared_bytes: int = ROOMY
    lengths: tuple[tuple[int, int], ...] = MIXED

    @property
    def plan(self) -> FlashPlan:
        sizes = self.head_dim, self.v_head_dim, 16
        plan = flash_plan(*sizes, self.kv_dtype, self.shared_bytes)
        assert plan is not None, self
        return plan


CASES = {
    "mixed": Case(),
    "long": Case(lengths=LONG),
    "many_short": Case(lengths=((3, 3), (2, 50), (1, 9)) * 30),
    "bf16": Case(kv_dtype="uint16"),
    "bf16_activations": Case(kv_dtype="uint16", dtype="bfloat16"),
    "f16_activations": Case(dtype="float16"),
    "heads_of_128": Case(num_heads=8, num_kv_heads=2, head_dim=128, v_head_dim=128, lengths=LONG),
    "heads_of_128_in_99_kib": Case(
        num_heads=2, num_kv_heads=2, head_dim=128, v_head_dim=128, lengths=LONG, shared_bytes=SMALL
    ),
    "heads_of_80": Case(num_heads=4, num_kv_heads=2, head_dim=80, v_head_dim=96),
    "heads_of_96": Case(num_heads=4, num_kv_heads=4, head_dim=96, v_head_dim=96, lengths=LONG),
    "heads_of_192": Case(num_heads=4, num_kv_heads=4, head_dim=192, v_head_dim=128, lengths=LONG),
    "heads_of_192_in_99_kib": Case(
        num_heads=2, num_kv_heads=1, head_dim=192, v_head_dim=192, shared_bytes=SMALL
    ),
    "heads_of_256": Case(num_heads=7, num_kv_heads=1, head_dim=256, v_head_dim=256, lengths=LONG),
    "heads_of_256_in_99_kib": Case(
        num_heads=2, num_kv_heads=1, head_dim=256, v_head_dim=256, shared_bytes=SMALL
    ),
    "small_heads": Case(num_heads=30, num_kv_heads=1, head_dim=16, v_head_dim=32),
    "window": Case(window=20, lengths=LONG),
    "window_of_one": Case(window=1),
    "softcap": Case(softcap=3.0, lengths=LONG),
    "sinks": Case(num_heads=8, num_kv_heads=1, sinks=True),
    "everything": Case(
        num_heads=10,
        num_kv_heads=2,
        head_dim=128,
        v_head_dim=128,
        kv_dtype="uint16",
        window=200,
        softcap=5.0,
        sinks=True,
        group=1,
        num_groups=2,
        lengths=LONG,
    ),
}
# Queries and weights are rounded to the pages' type. A query's rounding moves a score of size 15 by
# some 15 * 2^-12 (bfloat16: 2^-9), and with it a weight by as much; a weighted mean of values of
# size 1 by less. Outputs of 16 bits are rounded as well.
TOLERANCE = {"float16": 8e-3, "uint16": 4e-2}


def function(case):
    return paged_attention(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        v_head_dim=case.v_head_dim,
        page_size=16,
        kv_dtype=case.kv_dtype,
        scale=case.head_dim**-0.5,
        window=case.window,
        softcap=case.softcap,
        sinks=case.sinks,
        group=case.group,
        num_groups=case.num_groups,
        tokens=None,
        dtype=case.dtype,
        sink_dtype="float32",
        params=PARAMS,
        prefill=partial(flash, plan=case.plan),
    )


def example(case):
    """(the kernel's arrays without the output, the output in float64)."""
    rng = np.random.default_rng(7)
    sizes = case.head_dim, case.v_head_dim, 16
    batch = make_batch(
        rng,
        list(case.lengths),
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        v_head_dim=case.v_head_dim,
        page_size=16,
        kv_dtype=case.kv_dtype,
        group=case.group,
        num_groups=case.num_groups,
        window=case.window,
    )
    shape = (1, int(batch.q_starts[-1]), case.num_heads, case.head_dim)
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype
    q = (3 * rng.standard_normal(shape)).astype(dtype)
    sinks = rng.standard_normal(case.num_heads).astype(np.float32) if case.sinks else None
    both = zip(
        page_shapes(case.kv_dtype, *sizes), matrices(batch, case.kv_dtype, *sizes), strict=True
    )
    arrays = [q, batch.q_starts, batch.kv_lens, batch.block_tables, *(packed(*b) for b in both)]
    options = {"window": case.window, "softcap": case.softcap, "sinks": sinks}
    expected = attention(q, batch, scale=case.head_dim**-0.5, **options)
    return [*arrays, *([] if sinks is None else [sinks])], expected


@pytest.fixture(scope="module")
def kernels():
    named = {n: function(c).with_attr("global_symbol", n) for n, c in CASES.items()}
    return tvm.compile(tvm.IRModule(named), target=CudaTarget("sm_80,sm_90").tvm_target)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_attention_matches_float64(kernels, name):
    case = CASES[name]
    arrays, expected = example(case)
    out = np.full(expected.shape, np.nan, arrays[0].dtype)
    tensors = [tvm.runtime.tensor(array, tvm.cuda(0)) for array in (*arrays, out)]
    kernels[name](*tensors)
    found = tensors[-1].numpy().astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[case.kv_dtype], rtol=0)


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "names",
    [
        ("heads_of_128", "heads_of_96", "bf16"),
        pytest.param(tuple(CASES), marks=pytest.mark.slow, id="all"),
    ],
)
def test_tensor_cores_multiply_scores_and_values_without_spills(names, architecture, tmp_path):
    code = machine_code({name: function(CASES[name]) for name in names}, architecture)
    listing = sass_by_kernel(code, tmp_path)
    # The launches of a function: decode, its merge, prefill.
    found = {name: listing[f"{name}_kernel_2"] for name in names}
    for name, text in found.items():
        kind = "BF16" if CASES[name].kv_dtype == "uint16" else ""
        product = r"HGMMA\.64x\d+x16\.F32" if architecture == "sm_90" else r"HMMA\.16816\.F32"
        assert re.search(product + (rf"\.{kind}" if kind else r"\s"), text), name
        assert re.search(r"LDGSTS\.E\S*\.128", text), name
        assert not re.search(r"\b(STL|LDL)\b", text), f"{name} spills"


@pytest.mark.parametrize("shared_kib", sorted(set(SHARED_KIB.values())))
def test_every_even_head_has_a_plan_that_fits_whatever_the_device(shared_kib):
    for features in range(16, 257, 16):
        plan = flash_plan(features, features, 16, "float16", shared_kib * 1024)
        assert plan is not None, features
        assert flash_bytes(features, features, 16, plan) <= shared_kib * 1024, features


def test_where_there_is_room_heads_of_128_get_larger_tiles():
    rows = {kib: flash_plan(128, 128, 16, "uint16", kib * 1024).rows for kib in (99, 163)}
    assert rows == {99: 128, 163: 192}


def test_code_of_an_architecture_keeps_to_the_memory_of_all_that_run_it():
    assert SHARED_KIB["sm_80"] == min(SHARED_KIB[name] for name in ("sm_86", "sm_89"))


@needs_nvcc
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, "cuda.attention"),
        ({"kv_dtype": "uint16"}, "cuda.attention"),
        ({"kv_dtype": "float32"}, "gpu.attention"),
        ({"kv_dtype": "int8"}, "gpu.attention"),
        ({"head_dim": 72}, "gpu.attention"),
        ({"head_dim": 320}, "gpu.attention"),
        ({"head_dim": 256, "tokens": 1}, "gpu.attention"),
        ({"head_dim": 80, "scale": -1.0}, "gpu.attention"),
        ({"tokens": 1}, "cuda.attention"),  # single tokens have kernels of their own
        ({"scale": -1.0}, "cuda.attention"),
    ],
)
def test_what_tensor_cores_do_not_take_keeps_the_shared_kernel(change, rule):
    options = {"kv_dtype": "float16", "head_dim": 64, "tokens": None, "scale": 0.125, **change}
    head_dim, tokens = options["head_dim"], options["tokens"]
    target = CudaTarget()
    rows = tvm.tirx.Var("T", "int64") if tokens is None else tokens
    pages, s, b = (tvm.tirx.Var(n, "int64") for n in ("P", "S", "B"))
    kv = options["kv_dtype"]
    types = {
        "query": tvm.relax.TensorType([1, rows, 8, head_dim], "float32"),
        "q_starts": tvm.relax.TensorType([s + 1], "int32"),
        "kv_lens": tvm.relax.TensorType([s], "int32"),
        "block_tables": tvm.relax.TensorType([1, s, b], "int32"),
        "k_pages": tvm.relax.TensorType([pages, *target.key_page(2, head_dim, kv)], kv),
        "v_pages": tvm.relax.TensorType([pages, *target.value_page(2, head_dim, kv)], kv),
    }
    op = dialect.PagedAttention(
        group=0, scale=options["scale"], window=None, softcap=None, v_head_dim=head_dim
    )
    site = Site(op=op, types=types, max_tokens=64, tokens=tokens, num_groups=1, page_size=16)
    assert next(found for found, make in target.kernel_rules if make(site) is not None) == rule


@pytest.mark.parametrize(
    "wrong", [{"positions": 24}, {"stages": 1}, {"group_positions": 48}, {"warps": 6}]
)
def test_a_plan_that_does_not_divide_is_no_plan(wrong):
    right = {"warps": 8, "group_positions": 64}
    FlashPlan(**right)
    with pytest.raises(AssertionError):
        FlashPlan(**{**right, **wrong})


def test_plans_are_tried_from_the_smallest_head_on():
    assert [plan[:2] for plan in FLASH_PLANS] == sorted(plan[:2] for plan in FLASH_PLANS)


SINGLE = ((1, 1), (1, 16), (1, 40), (1, 300), (1, 2000))
DECODES = {
    "heads_of_64": Case(lengths=SINGLE),
    "heads_of_128": Case(num_heads=8, num_kv_heads=1, head_dim=128, v_head_dim=128, lengths=SINGLE),
    "sixteen_heads": Case(num_heads=16, num_kv_heads=1, lengths=SINGLE),
    "bf16_window": Case(kv_dtype="uint16", window=70, lengths=SINGLE),
    "capped_sinks": Case(softcap=5.0, sinks=True, group=1, num_groups=2, lengths=SINGLE),
    "beside_prompts": Case(lengths=MIXED),
}
# What rounding takes from queries and weights is multiplied as well: what is left is float32's, and
# that of powers of two (2^-22).
DECODE_TOLERANCE = 2e-4


def decode_function(case):
    return paged_attention(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        v_head_dim=case.v_head_dim,
        page_size=16,
        kv_dtype=case.kv_dtype,
        scale=case.head_dim**-0.5,
        window=case.window,
        softcap=case.softcap,
        sinks=case.sinks,
        group=case.group,
        num_groups=case.num_groups,
        tokens=None,
        dtype=case.dtype,
        sink_dtype="float32",
        params=PARAMS,
        decode=partial(attention_decode.decode, plan=DecodePlan()),
    )


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_single_tokens_are_multiplied_on_tensor_cores_without_spills(architecture, tmp_path):
    code = machine_code({n: decode_function(c) for n, c in DECODES.items()}, architecture)
    listing = sass_by_kernel(code, tmp_path)
    for name, case in DECODES.items():
        text = listing[f"{name}_kernel"]
        kind = r"\.BF16" if case.kv_dtype == "uint16" else r"\s"
        assert re.search(r"HMMA\.16816\.F32" + kind, text), name
        assert re.search(r"LDG\.E\S*\.128", text), name
        # ptxas puts up to five of sm_80's numbers elsewhere, one of sm_90's, registers left or not.
        most = 10 if architecture == "sm_80" else 2
        assert len(re.findall(r"\b(STL|LDL)\b", text)) <= most, f"{name} spills"


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODES)
def test_single_tokens_match_float64(name):
    case = DECODES[name]
    func = decode_function(case).with_attr("global_symbol", "main")
    target = CudaTarget("sm_80,sm_90").tvm_target
    kernel = tvm.compile(tvm.IRModule({"main": func}), target=target)
    arrays, expected = example(case)
    out = np.full(expected.shape, np.nan, arrays[0].dtype)
    tensors = [tvm.runtime.tensor(array, tvm.cuda(0)) for array in (*arrays, out)]
    kernel["main"](*tensors)
    starts = arrays[1]
    rows = starts[:-1][np.diff(starts) == 1]
    found = tensors[-1].numpy().astype(np.float64)[:, rows]
    np.testing.assert_allclose(found, expected[:, rows], atol=DECODE_TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("heads", "head_dim", "v_head_dim", "kv_dtype", "taken"),
    [
        (4, 128, 128, "float16", True),
        (16, 64, 64, "uint16", True),
        (12, 64, 64, "float16", False),
        (4, 256, 256, "float16", False),
        (4, 80, 80, "float16", False),
        (4, 128, 128, "int8", False),
    ],
)
def test_which_heads_decode_on_tensor_cores(heads, head_dim, v_head_dim, kv_dtype, taken):
    assert attention_decode.takes(heads, head_dim, v_head_dim, 16, kv_dtype) == taken

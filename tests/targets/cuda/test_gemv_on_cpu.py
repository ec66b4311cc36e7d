"""Products of one token on a CPU, as cuda_shim.py says."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc.targets.cuda.kernels import gemv
from llmc.targets.cuda.kernels.tensor_cores import cuda_format
from llmc.targets.cuda.parameters import gemv_plan
from llmc.targets.gpu import layout

sys.path.append(str(Path(__file__).parent.parent / "cpu"))
from cuda_shim import build, needs_gcc
from gemv_cases import FUSED, TOLERANCE, M, features_of
from matrices import random_matrix

pytestmark = needs_gcc


def definition(fmt, gate, plan):
    """C++ of one product with RMSNorm and bias, and with a gate or a residual."""
    options = f"true, {gemv.GATES['silu'] if gate else 0}, true, {str(not gate).lower()}"
    template = f"{cuda_format(fmt)}, {plan.warps}, {plan.ahead}, {options}, float, float, float"
    name = f"run_{fmt.name.replace('-', '_')}_{int(gate)}"
    return f"""
extern "C" void {name}(const Arguments* given, int stride, void* memory) {{
  arguments = given;
  shared = memory;
  tiles = stride;
  for (tile = 0; tile < stride; ++tile) shim::run({32 * plan.warps}, [] {{
    const Arguments& a = *arguments;
    llmc::gemv<{template}>(a.codes, a.scales, a.mins, a.x, a.norm, a.bias, a.residual, a.y, a.m,
                           a.k, a.chunks, a.groups, 1e-5f, 1.f, tile, tiles, shared);
  }});
}}
"""


POINTERS = ("codes", "scales", "mins", "x", "norm", "bias", "residual", "y")
NUMBERS = ("m", "k", "chunks", "groups")


class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in NUMBERS),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    pointers = "".join(f"  void* {name};\n" for name in POINTERS)
    numbers = "".join(f"  int {name};\n" for name in NUMBERS)
    held = "static const Arguments* arguments;\nstatic void* shared;\nstatic int tile, tiles;\n"
    products = [
        definition(fmt, gate, gemv_plan(features_of(fmt))) for fmt in FUSED for gate in (0, 1)
    ]
    code = f"struct Arguments {{\n{pointers}{numbers}}};\n{held}{''.join(products)}"
    return build(["tensor_cores", "gemv"], code, tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("fmt", FUSED, ids=lambda f: f.name)
def test_norm_product_and_what_follows_match_float64(library, fmt, gate):
    rng, k = np.random.default_rng(3), features_of(fmt)
    matrix, exact = random_matrix(rng, fmt, M, k)
    outputs = M // 2 if gate else M
    x, norm, bias, residual = (
        rng.standard_normal(n).astype(np.float32) for n in (k, k, M, outputs)
    )
    parts = [np.ascontiguousarray(a) for a in layout.pack(fmt, [matrix])]
    y = np.full(outputs, np.nan, np.float32)
    arrays = dict(zip(POINTERS, [*parts, y, y][:3], strict=False))
    arrays |= {"x": x, "norm": norm, "bias": bias, "residual": residual, "y": y}
    groups = 0 if fmt.is_float else layout.stored_groups(fmt, k)
    numbers = {"m": M, "k": k, "chunks": layout.num_chunks(fmt, k), "groups": groups}
    arguments = Arguments(**{n: a.ctypes.data for n, a in arrays.items()}, **numbers)
    plan = gemv_plan(k)
    num_bytes = gemv.shared_bytes(fmt, k, plan)
    memory = np.full(num_bytes + 64, 0xFF, np.uint8)  # NaN; nobody may write behind its end
    stride = min(plan.blocks, outputs // gemv.TILE)
    run = library[f"run_{fmt.name.replace('-', '_')}_{int(gate)}"]
    run(ctypes.byref(arguments), stride, ctypes.c_void_p(memory.ctypes.data))
    assert (memory[num_bytes:] == 0xFF).all()
    normed = x / np.sqrt(np.mean(x.astype(np.float64) ** 2) + 1e-5) * (norm + 1)
    expected = exact @ normed + bias
    if gate:
        half = expected[:outputs]
        expected = half / (1 + np.exp(-half)) * expected[outputs:]
    else:
        expected = expected + residual
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[fmt.is_float]

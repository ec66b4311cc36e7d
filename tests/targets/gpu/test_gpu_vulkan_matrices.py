"""Products by Vulkan's cooperative matrices: what is built, and its arithmetic, emulated.

The shaders are those that are shipped, but for the statements about matrices, which are replaced by
what the extension says they do.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm
from gpu_device import build, empty, normal, run
from gpu_experts import routed_rows
from matrices import random_matrix

from llmc import dialect
from llmc.errors import CompileError, UsageError
from llmc.formats import FORMATS
from llmc.targets.base import Site
from llmc.targets.gpu import layout
from llmc.targets.gpu.kernels.grouped_tiles import FloatTile, grouped_tiles
from llmc.targets.gpu.kernels.linear import linear_many
from llmc.targets.gpu.kernels.matrix_tile import multiply_tile
from llmc.targets.vulkan import build as vulkan_build_module
from llmc.targets.vulkan import spirv
from llmc.targets.vulkan.glsl_kernel import print_kernel
from llmc.targets.vulkan.target import LEVELS, VulkanTarget

M = 70  # neither a multiple of a panel nor of a tile
EXPERTS, TOP = 5, 2
TILE = LEVELS["matrix"].tile
assert TILE.unit.subgroup == 32, "as the emulation has it"
# Activations and dequantized weights are rounded to 11 bits, which leaves an error of some 2^-12 of
# the norm; sums are float32.
TOLERANCE = 8e-4
# One of each way to decode a chunk; the products of one token show all formats.
FEATURES_OF = {"f16": 102, "w8": 102, "q4_1": 96, "q2_k": 256, "q6_k": 256}
F32 = {"dtype": "float32", "vector_dtype": "float32"}
BOTH = {"bias": True, "residual": True}
OPERATION_NAMES = {4457: "load", 4458: "store", 4459: "multiply"}  # SPV_KHR_cooperative_matrix

# A factor is a place in shared memory; of a sum, each of a subgroup's 32 threads has 8 numbers.
DEFINITIONS = """
struct Factor { int at; int stride; };
struct Sum { float n[8]; };
int LANE = int(gl_LocalInvocationIndex % 32), ROW = LANE / 2, COLUMN = LANE % 2 * 8;
#define FILL(m, x) for (int i = 0; i < 8; ++i) m.n[i] = x
#define LOAD(m, at, stride) m = Factor(at, stride)
#define MULTIPLY(c, a, from_a, b, from_b) \\
  for (int k = 0; k < 16; ++k) for (int i = 0; i < 8; ++i) \\
    c.n[i] += float(from_a[a.at + ROW * a.stride + k]) * \\
              float(from_b[b.at + k * b.stride + COLUMN + i])
#define STORE(m, to, at, stride) \\
  for (int i = 0; i < 8; ++i) to[(at) + ROW * (stride) + COLUMN + i] = m.n[i]
"""
KIND = r"coopmat<\w+, gl_ScopeSubgroup, 16, 16, gl_MatrixUse{}>"
SHIPPED = {  # statements that the generator prints, and what they become here
    rf"(.*) = {KIND.format('Accumulator')}\((.*)\);": r"FILL(\1, \2);",
    r"coopMatLoad\((.*?), \w+, (.*), gl_CooperativeMatrixLayoutRowMajor\);": r"LOAD(\1, \2);",
    r"coopMatStore\((.*), gl_CooperativeMatrixLayoutRowMajor\);": r"STORE(\1);",
    r"(\S+) = coopMatMulAdd\((\S+), (\S+), \1\);": r"MULTIPLY(\1, \2, \2@, \3, \3@);",
    KIND.format("[AB]"): "Factor",
    KIND.format("Accumulator"): "Sum",
    r"#extension GL_KHR_(cooperative_matrix|memory_scope_semantics).*\n": "",
    "gl_SubgroupID": "(gl_LocalInvocationIndex / 32)",
}


def emulated(source):
    """The shader without the extension."""
    read_from = dict(re.findall(r"coopMatLoad\((\w+)\[\d+\], (\w+),", source))
    for statement, meaning in SHIPPED.items():
        source, count = re.subn(statement, meaning, source)
        assert count, statement
    source = re.sub(r"(\w+)\[\d+\]@", lambda found: read_from[found[1]], source)
    assert "coopMat" not in source
    return source.replace("layout(push_constant", f"{DEFINITIONS}layout(push_constant", 1)


def print_emulated(func):
    kernel = print_kernel(func)
    if "coopmat" not in kernel.source:
        return kernel
    features = kernel.features - {"cooperativeMatrix16x16x16", "vulkanMemoryModel"}
    return replace(kernel, source=emulated(kernel.source), features=features)


def functions():
    named = {
        name: linear_many(
            *(FORMATS[name], M, k), params=TILE, multiply=multiply_tile, **BOTH, **F32
        )
        for name, k in FEATURES_OF.items()
    }
    half = {"dtype": "float16", "vector_dtype": "float16", "bias": False, "residual": False}
    named["half"] = linear_many(FORMATS["q4_1"], M, 96, params=TILE, multiply=multiply_tile, **half)
    for per_token_input in (True, False):
        named[f"experts_{per_token_input}"] = grouped_tiles(
            *(FORMATS["q4_0"], EXPERTS, M, 96, TOP),
            per_token_input=per_token_input,
            bias=True,
            tile=FloatTile(TILE, multiply_tile),
            **F32,
        )
    return named


@pytest.fixture(scope="module")
def kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vulkan_build_module, "print_kernel", print_emulated)
        return build(functions())


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("tokens", [1, 16, 45, 70])
@pytest.mark.parametrize("name", FEATURES_OF)
def test_products_of_every_format_with_bias_and_residual(kernels, name, tokens):
    fmt, k = FORMATS[name], FEATURES_OF[name]
    matrix, exact = random_matrix(np.random.default_rng(tokens), fmt, M, k)
    x, residual, bias = normal(1, tokens, k), normal(1, tokens, M), normal(M)
    weights = layout.pack(fmt, [matrix], stacked=False)
    (y,) = run(kernels[name], x, *weights, bias, residual, empty(1, tokens, M), outputs=[-1])
    error = relative_error(y - bias - residual, x.astype(np.float64) @ exact.T)
    assert error < TOLERANCE


def test_activations_too_large_for_float16_become_the_largest(kernels):
    fmt = FORMATS["q4_1"]
    matrix, exact = random_matrix(np.random.default_rng(1), fmt, M, 96)
    x, zeros = np.zeros((1, 20, 96), np.float32), np.zeros((1, 20, M), np.float32)
    x[0, :, 5] = 1e6
    weights = layout.pack(fmt, [matrix], stacked=False)
    arrays = (x, *weights, zeros[0, 0], zeros, empty(1, 20, M))
    (y,) = run(kernels["q4_1"], *arrays, outputs=[-1])
    assert relative_error(y[0, 3], exact[:, 5] * 65504) < TOLERANCE


def test_float16_activations(kernels):
    fmt = FORMATS["q4_1"]
    matrix, exact = random_matrix(np.random.default_rng(2), fmt, M, 96)
    x = normal(1, 33, 96).astype(np.float16)
    weights = layout.pack(fmt, [matrix], stacked=False)
    (y,) = run(kernels["half"], x, *weights, empty(1, 33, M, dtype=np.float16), outputs=[-1])
    assert relative_error(y, x.astype(np.float64) @ exact.T) < 1e-3  # y is rounded too


@pytest.mark.parametrize("shared_input", [True, False])
def test_rows_go_through_the_experts_chosen_for_them(kernels, shared_input):
    sizes = {"num_experts": EXPERTS, "top_k": TOP, "shared_input": shared_input}
    for tokens in (1, 13, 60):
        case = routed_rows(FORMATS["q4_0"], M, 96, tokens=tokens, **sizes)
        (y,) = run(
            kernels[f"experts_{shared_input}"], *case.arrays, empty(tokens * TOP, M), outputs=[-1]
        )
        assert relative_error(y - case.biases, case.products) < TOLERANCE


def operations(code):
    """The matrix operations of SPIR-V, in order."""
    words, at, found = np.frombuffer(code, "<u4"), 5, []
    while at < len(words):
        found.append(OPERATION_NAMES.get(int(words[at]) & 0xFFFF))
        at += int(words[at]) >> 16
    return [name for name in found if name is not None]


def test_what_is_built_multiplies_matrices_and_says_what_it_needs(kernels, monkeypatch):
    target = VulkanTarget("matrix")
    codes = []
    monkeypatch.setattr(
        vulkan_build_module,
        "compile_glsl",
        lambda name, source: codes.append(spirv.compile_glsl(name, source)) or codes[-1],
    )
    func = functions()["q4_1"].with_attr("global_symbol", "main")
    built = tvm.compile(func, target=target.tvm_target)
    features = set(built.mod.get_function("llmc_features", query_imports=True)())
    assert {"cooperativeMatrix16x16x16", "shaderFloat16", "vulkanMemoryModel"} <= features
    [code] = codes  # valid: spirv-val has seen it
    # Two by one matrices of a subgroup: three factors make two products, stored once.
    assert operations(code) == ["load"] * 3 + ["multiply"] * 2 + ["store"] * 2


def site(fmt, op, max_tokens):
    tensor = tvm.relax.TensorType
    rows = tvm.tirx.Var("rows", "int64")
    if isinstance(op, dialect.Linear):
        types = {"x": tensor((1, rows, 256), "float32"), "weight": tensor((64, 256), "float32")}
    else:
        types = {
            "x": tensor((rows, 256), "float32"),
            "expert_ids": tensor((rows, 2), "int32"),
            "weight": tensor((8, 64, 256), "float32"),
        }
    return Site(op=op, types=types, max_tokens=max_tokens, tokens=None, num_groups=1, page_size=16)


@pytest.mark.parametrize(
    ("level", "fmt", "max_tokens", "products", "experts"),
    [
        ("matrix", "q4_1", 512, "vulkan.matrix", "vulkan.matrix_experts"),
        ("matrix", "f16", 512, "vulkan.matrix", "vulkan.matrix_experts"),
        ("matrix", "bf16", 512, "gpu.gemm", "gpu.experts"),
        ("matrix", "f32", 512, "gpu.gemm", "gpu.experts"),
        ("matrix", "q4_1", 8, "gpu.few", "gpu.few_experts"),
        ("portable", "q4_1", 512, "gpu.gemm", "gpu.experts"),
    ],
)
def test_matrices_multiply_many_tokens_by_what_float16_holds(
    kernels, level, fmt, max_tokens, products, experts
):
    rules = VulkanTarget(level).kernel_rules
    linear = dialect.Linear(format=fmt)
    grouped = dialect.GroupedLinear(format=fmt)
    for op, expected in ((linear, products), (grouped, experts)):
        place = site(fmt, op, max_tokens)
        assert next(name for name, rule in rules if rule(place) is not None) == expected


def test_tools_that_are_too_old_are_named_with_what_brings_newer_ones(kernels, monkeypatch):
    monkeypatch.setattr(spirv, "_knows_matrices", lambda validator: False)
    with pytest.raises(CompileError, match="too old for cooperative matrices") as caught:
        VulkanTarget("portable,matrix")
    assert 'pip install "llmc[vulkan]"' in str(caught.value.hint)


def test_levels_are_named_once(kernels):
    with pytest.raises(UsageError, match="named twice in 'matrix,portable,matrix'"):
        VulkanTarget("matrix,portable,matrix")
    with pytest.raises(UsageError, match="unknown Vulkan level ''"):
        VulkanTarget("matrix,")

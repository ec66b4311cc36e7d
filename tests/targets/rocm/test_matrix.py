"""Products by matrix instructions: their arithmetic, emulated, against float64.

The kernels are those that are shipped, but for the instruction itself: each lane puts what it holds
into shared memory where the instruction's description says, and sums its outputs from there.
"""

import numpy as np
import pytest
from gpu_device import build, empty, normal, run
from gpu_experts import routed_rows
from matrices import random_matrix
from tvm.script.ir_builder import tirx as T

from llmc.formats import FORMATS
from llmc.targets.building import i64, put
from llmc.targets.gpu import layout
from llmc.targets.gpu.kernels.block import quotient, shared, sync
from llmc.targets.gpu.kernels.grouped_tiles import grouped_tiles
from llmc.targets.rocm.kernels.linear import ExpertTile, linear_matrix, threads
from llmc.targets.rocm.kernels.matrix import Product, multiplied_type
from llmc.targets.rocm.kernels.matrix_instruction import MFMA, SIDE, WMMA
from llmc.targets.rocm.parameters import MatrixPlan, MatrixTile

M = 70  # neither a multiple of a panel nor of a tile
EXPERTS, TOP = 5, 2
# Activations and dequantized weights are rounded to 11 bits (bfloat16: 8), which leaves an error of
# some 2^-12 (2^-9) of the norm; sums are float32.
TOLERANCE = {"float16": 6e-4, "bfloat16": 4e-3}
INSTRUCTIONS = {"mfma": MFMA, "wmma": WMMA}
# One of each way to decode a chunk; the products of one token show all formats.
CASES = [("mfma", FORMATS[n]) for n in ("f16", "bf16", "w8", "q4_1")]
CASES += [("wmma", FORMATS[n]) for n in ("bf16", "q4_1")]


def features_of(fmt):
    """Input features that end within a chunk, where the format's groups allow it."""
    return {0: 102, 16: 80}.get(fmt.group, 3 * fmt.group)


def plan(name):
    """Every way through the kernels, in blocks that any Vulkan device has."""
    instruction = INSTRUCTIONS[name]
    waves = 256 // instruction.wavefront
    return MatrixPlan(
        instruction=instruction,
        steps=((16, MatrixTile(tokens=16, row_tiles=1, splits=2)),),
        last=MatrixTile(tokens=32, waves=waves // 2, shared=True),
        experts=MatrixTile(tokens=16, row_tiles=1, waves=waves // 2, depth=2, shared=True),
    )


def emulate(self, a, b, token):
    """In place of Product.multiply."""
    instruction, words = self.instruction, self.instruction.lane_features // 2
    waves = threads(self.tile, instruction) // instruction.wavefront
    if not hasattr(self, "matrices"):
        self.matrices = [shared((waves, SIDE, SIDE)) for _ in "ab"]
    left, right = self.matrices
    wave = T.Bind(quotient(self.work.thread, instruction.wavefront))
    with T.serial(i64(self.step.lane_features // 2 // words)) as number:
        for row, weights in enumerate(a):
            with T.serial(i64(words)) as word:
                for half in range(2):
                    first = self.group * i64(instruction.lane_features)
                    feature = first + i64(2) * word + i64(half)
                    for matrix, source in ((left, b), (right, weights)):
                        value = unpacked(self.dtype, source[number * i64(words) + word], half)
                        put(matrix, value, wave, self.line, feature)
            sync()
            with T.serial(i64(instruction.outputs)) as output, T.serial(i64(SIDE)) as feature:
                line = instruction.output_row(self.lane, output)
                at = (i64(row), i64(token), output)
                product = left[wave, line, feature] * right[wave, self.line, feature]
                put(self.sums, self.sums[at] + product, *at)
            sync()


def unpacked(dtype, word, half):
    """One of a word's two numbers, float32."""
    if dtype == "bfloat16":
        high = T.bitwise_and(word, T.int32(-65536)) if half else T.shift_left(word, T.int32(16))
        return T.reinterpret("float32", high)
    bits = T.shift_right(word, T.int32(16)) if half else word
    bits = T.Cast("uint16", T.bitwise_and(bits, T.int32(65535)))
    return T.Cast("float32", T.reinterpret("float16", bits))


def product(name, fmt, m, k, **options):
    options = {"dtype": "float32", "vector_dtype": "float32", **options}
    options = {"bias": True, "residual": True, **options}
    return linear_matrix(fmt, m, k, plan=plan(name), **options)


@pytest.fixture(scope="module")
def emulated(vulkan):
    functions = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Product, "multiply", emulate)
        for name, fmt in CASES:
            functions[f"{name}_{fmt.name}"] = product(name, fmt, M, features_of(fmt))
        half = {"dtype": "float16", "vector_dtype": "float16", "bias": False, "residual": False}
        for name, instruction in INSTRUCTIONS.items():
            functions[f"{name}_half"] = product(name, FORMATS["q4_1"], M, 96, **half)
            functions[f"{name}_experts"] = grouped_tiles(
                *(FORMATS["q4_0"], EXPERTS, M, 96, TOP),
                per_token_input=name == "mfma",
                bias=True,
                dtype="float32",
                vector_dtype="float32",
                tile=ExpertTile(plan(name).experts, instruction),
            )
        functions = {name.replace("-", "_"): func for name, func in functions.items()}
        return build(functions)


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("tokens", [1, 16, 17, 45])
@pytest.mark.parametrize(("name", "fmt"), CASES, ids=lambda c: getattr(c, "name", c))
def test_products_of_every_format_with_bias_and_residual(emulated, name, fmt, tokens):
    matrix, exact = random_matrix(np.random.default_rng(tokens), fmt, M, features_of(fmt))
    x, residual, bias = normal(1, tokens, features_of(fmt)), normal(1, tokens, M), normal(M)
    weights = layout.pack(fmt, [matrix], stacked=False)
    kernel = emulated[f"{name}_{fmt.name}".replace("-", "_")]
    (y,) = run(kernel, x, *weights, bias, residual, empty(1, tokens, M), outputs=[-1])
    error = relative_error(y - bias - residual, x.astype(np.float64) @ exact.T)
    assert error < TOLERANCE[multiplied_type(fmt)]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_activations_too_large_for_float16_become_the_largest(emulated, name):
    fmt = FORMATS["q4_1"]
    k = features_of(fmt)
    matrix, exact = random_matrix(np.random.default_rng(1), fmt, M, k)
    x, zeros = np.zeros((1, 20, k), np.float32), np.zeros((1, 20, M), np.float32)
    x[0, :, 5] = 1e6
    weights = layout.pack(fmt, [matrix], stacked=False)
    arrays = (x, *weights, zeros[0, 0], zeros, empty(1, 20, M))
    (y,) = run(emulated[f"{name}_q4_1"], *arrays, outputs=[-1])
    assert relative_error(y[0, 3], exact[:, 5] * 65504) < TOLERANCE["float16"]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_float16_activations(emulated, name):
    fmt = FORMATS["q4_1"]
    matrix, exact = random_matrix(np.random.default_rng(2), fmt, M, 96)
    x = normal(1, 33, 96).astype(np.float16)
    weights = layout.pack(fmt, [matrix], stacked=False)
    arrays = (x, *weights, empty(1, 33, M, dtype=np.float16))
    (y,) = run(emulated[f"{name}_half"], *arrays, outputs=[-1])
    assert relative_error(y, x.astype(np.float64) @ exact.T) < 1e-3  # y is rounded too


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_rows_go_through_the_experts_chosen_for_them(emulated, name):
    shared_input = name == "mfma"
    sizes = {"num_experts": EXPERTS, "top_k": TOP, "shared_input": shared_input}
    for tokens in (1, 13, 60):
        case = routed_rows(FORMATS["q4_0"], M, 96, tokens=tokens, **sizes)
        (y,) = run(emulated[f"{name}_experts"], *case.arrays, empty(tokens * TOP, M), outputs=[-1])
        error = relative_error(y - case.biases, case.products)
        assert error < TOLERANCE["float16"]

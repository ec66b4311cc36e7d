"""Kernels in every construct of TIR that the generator knows, run and compared with NumPy."""

import math

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T
from vulkan_build import compiled, run

rng = np.random.default_rng(0)


def elementwise(dtype, out, body, n=100):
    """A kernel `out[i] = body(x[i])` over n elements."""

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((n,), dtype), y: T.Buffer((n,), out)):
        for block in T.thread_binding((n + 63) // 64, thread="blockIdx.x"):
            for thread in T.thread_binding(64, thread="threadIdx.x"):
                if block * 64 + thread < n:
                    y[block * 64 + thread] = body(x[block * 64 + thread])

    return main


def apply(body, x, out=None):
    out = out or str(x.dtype)
    func = elementwise(str(x.dtype), out, body, len(x))
    return run(func, x, np.zeros(len(x), out))[1]


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "int8", "int16", "int32", "uint8", "uint16", "uint32", "int64"]
)
def test_elements_of_every_type_are_loaded_computed_and_stored(dtype):
    x = rng.integers(1, 100, 100).astype(dtype)
    got = apply(lambda v: v + tvm.tirx.const(3, dtype), x)
    np.testing.assert_array_equal(got, x + np.asarray(3, dtype))


def test_data_of_64_bits_keep_them():
    x = rng.integers(-(2**62), 2**62, 100)
    np.testing.assert_array_equal(apply(lambda v: v + tvm.tirx.const(2**40, "int64"), x), x + 2**40)


def test_bools_are_bytes_in_memory():
    x = rng.standard_normal(100).astype("float32")
    positive = apply(lambda v: v > T.float32(0), x, "bool")
    np.testing.assert_array_equal(positive, x > 0)
    np.testing.assert_array_equal(apply(lambda v: tvm.tirx.Not(v), positive), x <= 0)


# Vulkan allows exp and the like an error of a few ulp and tanh one of several more.
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("exp", np.exp),
        ("exp2", np.exp2),
        ("log", lambda x: np.log(np.abs(x) + 1)),
        ("sqrt", lambda x: np.sqrt(np.abs(x) + 1)),
        ("rsqrt", lambda x: 1 / np.sqrt(np.abs(x) + 1)),
        ("tanh", np.tanh),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("erf", lambda x: np.array([math.erf(v) for v in x])),
        ("sin", np.sin),
        ("cos", np.cos),
        ("floor", np.floor),
        ("ceil", np.ceil),
        ("trunc", np.trunc),
        ("fabs", np.abs),
    ],
)
def test_functions_of_floats_are_those_of_the_c_library(name, reference):
    x = (rng.standard_normal(200) * 3).astype("float32")

    def body(v):
        if name in ("log", "sqrt", "rsqrt"):
            v = tvm.tirx.abs(v) + T.float32(1)
        return getattr(tvm.tirx, "abs" if name == "fabs" else name)(v)

    want = reference(x.astype("float64"))
    np.testing.assert_allclose(apply(body, x), want, rtol=3e-6, atol=1e-6)


def test_functions_hold_at_the_ends_of_their_range():
    x = np.array([-1e30, -100, 0, 100, 1e30], "float32")
    np.testing.assert_array_equal(apply(tvm.tirx.tanh, x), [-1, -1, 0, 1, 1])
    np.testing.assert_array_equal(apply(tvm.tirx.sigmoid, x), [0, 0, 0.5, 1, 1])
    low = apply(lambda v: tvm.tirx.exp(v + tvm.tirx.const(-math.inf, "float32")), x)
    np.testing.assert_array_equal(low, np.zeros(5))


def test_powers_of_negative_numbers_have_their_sign():
    x = np.array([-3, -2, -0.5, 0, 2], "float32")
    for y in (0, 1, 2, 3):
        got = apply(lambda v, y=y: tvm.tirx.power(v, T.float32(y)), x)
        np.testing.assert_allclose(got, x**y, rtol=1e-5)


@pytest.mark.parametrize("divisor", [7, -7])
def test_divisions_round_as_tir_says(divisor):
    x = np.arange(-50, 50, dtype="int32")
    d = tvm.tirx.const(divisor, "int32")
    np.testing.assert_array_equal(apply(lambda v: tvm.tirx.floordiv(v, d), x), x // divisor)
    np.testing.assert_array_equal(apply(lambda v: tvm.tirx.floormod(v, d), x), x % divisor)
    quotient = np.trunc(x / divisor).astype("int32")
    np.testing.assert_array_equal(apply(lambda v: tvm.tirx.truncdiv(v, d), x), quotient)
    rest = x - quotient * divisor
    np.testing.assert_array_equal(apply(lambda v: tvm.tirx.truncmod(v, d), x), rest)


@pytest.mark.parametrize("hoisted", [False, True])
@pytest.mark.parametrize(("offset", "divisor"), [(0, 3), (5, 3), (5, 7), (-9, 3), (10**6, 1000)])
def test_divisions_of_indices_that_may_be_negative_do_not_overflow(offset, divisor, hoisted):
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((64,), "int32"), y: T.Buffer((64,), "int32"), z: T.Buffer((64,), "int32")):
        for thread in T.thread_binding(64, thread="threadIdx.x"):
            at = T.Cast("int64", x[thread]) + T.int64(offset)
            y[thread] = T.Cast("int32", at // T.int64(divisor))
            z[thread] = T.Cast("int32", at % T.int64(divisor))

    # What TVM makes of them differs with what else is computed from the same number.
    options = {} if hoisted else {"tirx.disable_cse_tir": True}
    x = np.concatenate([np.arange(-32, 0), np.arange(2**31 - 1000040, 2**31 - 1000008)])
    x = x.astype("int32")
    with tvm.transform.PassContext(config=options):
        _, y, z = run(main, x, np.zeros(64, "int32"), np.zeros(64, "int32"))
    np.testing.assert_array_equal(y, (x.astype("int64") + offset) // divisor)
    np.testing.assert_array_equal(z, (x.astype("int64") + offset) % divisor)


def test_sums_of_indices_beyond_32_bits_are_made_in_64():
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((64,), "int32"), y: T.Buffer((64,), "int32")):
        for thread in T.thread_binding(64, thread="threadIdx.x"):
            far = T.Cast("int64", x[thread]) + T.int64(2**31 - 8)
            y[thread] = T.Cast("int32", T.truncdiv(far * T.int64(2), T.int64(5)))

    x = np.arange(64).astype("int32")
    library = compiled(main)
    assert "shaderInt64" in library.mod.get_function("llmc_features", query_imports=True)()
    y = run(main, x, np.zeros(64, "int32"))[1]
    np.testing.assert_array_equal(y, (x.astype("int64") + 2**31 - 8) * 2 // 5)


def test_bits_are_reinterpreted_shifted_and_masked():
    x = rng.integers(0, 2**32, 100, dtype="uint32")
    got = apply(lambda v: (v >> T.uint32(4)) & T.uint32(15) | (v << T.uint32(8)), x)
    np.testing.assert_array_equal(got, x >> 4 & 15 | x << 8)
    bf16 = rng.integers(0, 0x7F00, 100).astype("uint16")
    got = apply(
        lambda v: T.reinterpret("float32", T.Cast("uint32", v) << T.uint32(16)), bf16, "float32"
    )
    np.testing.assert_array_equal(got, (bf16.astype("uint32") << 16).view("float32"))


def test_vectors_are_loaded_at_once_where_aligned_and_by_elements_where_not():
    n = 64

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((4 * n + 1,), "float32"), y: T.Buffer((8 * n,), "float32")):
        for thread in T.thread_binding(n, thread="threadIdx.x"):
            y[T.ramp(thread * 4, 1, 4)] = x[T.ramp(thread * 4, 1, 4)] * T.broadcast(T.float32(2), 4)
            y[T.ramp(thread * 4 + 4 * n, 1, 4)] = x[T.ramp(thread * 4 + 1, 1, 4)]

    x = rng.standard_normal(4 * n + 1).astype("float32")
    got = run(main, x, np.zeros(8 * n, "float32"))[1]
    np.testing.assert_array_equal(got, np.concatenate([2 * x[:-1], x[1:]]))


def test_loops_of_every_kind_and_nested_branches():
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((64,), "int32"), y: T.Buffer((64,), "int32")):
        for thread in T.thread_binding(64, thread="threadIdx.x"):
            n = T.alloc_buffer((2,), "int32", scope="local")
            n[0] = x[thread]
            n[1] = 0
            # The Collatz steps to 1, by the definition.
            while n[0] != 1:
                if n[0] % 2 == 0:
                    n[0] = n[0] // 2
                else:
                    n[0] = 3 * n[0] + 1
                n[1] = n[1] + 1
            for i in T.unroll(3):
                n[1] = n[1] + i
            for _ in T.serial(x[thread]):
                n[1] = n[1] + 1
            y[thread] = n[1]

    def steps(n):
        count = 0
        while n != 1:
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            count += 1
        return count

    x = np.arange(1, 65, dtype="int32")
    got = run(main, x, np.zeros(64, "int32"))[1]
    np.testing.assert_array_equal(got, [steps(v) + 3 + v for v in x])


def test_shared_memory_passes_between_threads_at_a_barrier():
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((256,), "float32"), y: T.Buffer((256,), "float32")):
        for block in T.thread_binding(2, thread="blockIdx.x"):
            for thread in T.thread_binding(128, thread="threadIdx.x"):
                shared = T.alloc_buffer((128,), "float32", scope="shared")
                shared[thread] = x[block * 128 + thread]
                T.evaluate(T.tvm_storage_sync("shared"))
                y[block * 128 + thread] = shared[127 - thread]

    x = rng.standard_normal(256).astype("float32")
    got = run(main, x, np.zeros(256, "float32"))[1]
    np.testing.assert_array_equal(got, x.reshape(2, 128)[:, ::-1].reshape(-1))


@pytest.mark.parametrize("start", [0, 1])
def test_shared_memory_is_read_by_vectors_where_aligned_and_by_elements_where_not(start):
    n = 64

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((4 * n + 1,), "float32"), y: T.Buffer((8 * n,), "float32")):
        for thread in T.thread_binding(n, thread="threadIdx.x"):
            shared = T.alloc_buffer((4 * n + 1,), "float32", scope="shared")
            for i in T.serial(5):
                if thread + i * n < 4 * n + 1:
                    shared[thread + i * n] = x[thread + i * n]
            T.evaluate(T.tvm_storage_sync("shared"))
            y[T.ramp(thread * 4, 1, 4)] = shared[T.ramp(thread * 4 + start, 1, 4)]
            T.evaluate(T.tvm_storage_sync("shared"))
            shared[T.ramp(thread * 4, 1, 4)] = x[T.ramp(thread * 4, 1, 4)] * T.broadcast(
                T.float32(2), 4
            )
            T.evaluate(T.tvm_storage_sync("shared"))
            y[thread + 4 * n] = shared[4 * n - 1 - thread]

    x = rng.standard_normal(4 * n + 1).astype("float32")
    y = run(main, x, np.zeros(8 * n, "float32"))[1]
    np.testing.assert_array_equal(y[: 4 * n], x[start : start + 4 * n])
    np.testing.assert_array_equal(y[4 * n : 5 * n], 2 * x[4 * n - n : 4 * n][::-1])


def test_subgroups_reduce_and_shuffle_whatever_their_size():
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((64,), "float32"), y: T.Buffer((4, 64), "float32")):
        for thread in T.thread_binding(64, thread="threadIdx.x"):
            y[0, thread] = T.call_pure_extern("float32", "subgroupAdd", x[thread])
            y[1, thread] = T.call_pure_extern("float32", "subgroupMax", x[thread])
            y[2, thread] = T.call_pure_extern("float32", "subgroupShuffleXor", x[thread], 1)
            y[3, thread] = T.Cast("float32", T.call_pure_extern("uint32", "gl_SubgroupSize"))

    x = rng.standard_normal(64).astype("float32")
    y = run(main, x, np.zeros((4, 64), "float32"))[1]
    groups = x.reshape(-1, int(y[3, 0]))
    np.testing.assert_allclose(y[0].reshape(groups.shape)[:, 0], groups.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(y[1].reshape(groups.shape)[:, 0], groups.max(1))
    np.testing.assert_array_equal(y[2], x[np.arange(64) ^ 1])


def test_more_arguments_than_push_constants_hold_go_through_memory():
    @T.prim_func(s_tir=True)
    def main(
        y: T.Buffer((16,), "int32"),
        a: T.int32,
        b: T.int32,
        c: T.int32,
        d: T.int32,
        e: T.int32,
        f: T.int32,
        g: T.int32,
        h: T.int32,
        i: T.int32,
        j: T.int32,
        k: T.int32,
        m: T.int32,
        n: T.int32,
        o: T.float32,
        p: T.int32,
        q: T.int32,
    ):
        for thread in T.thread_binding(16, thread="threadIdx.x"):
            y[thread] = (
                a + b + c + d + e + f + g + h + i + j + k + m + n + T.Cast("int32", o * 2.0)
            ) * thread + p * q

    values = list(range(100, 116))
    values[13] = 0.5
    got = run(main, np.zeros(16, "int32"), *values)[0]
    np.testing.assert_array_equal(got, (sum(values[:13]) + 1) * np.arange(16) + 114 * 115)


def test_a_grid_longer_than_a_device_allows_is_folded():
    n = 70_001

    @T.prim_func(s_tir=True)
    def main(y: T.Buffer((n,), "int32")):
        for block in T.thread_binding(n, thread="blockIdx.x"):
            for thread in T.thread_binding(1, thread="threadIdx.x"):
                y[block + thread] = block * 3

    np.testing.assert_array_equal(run(main, np.zeros(n, "int32"))[0], 3 * np.arange(n))


def test_extents_known_at_run_time_may_be_zero():
    @T.prim_func(s_tir=True)
    def main(px: T.handle, py: T.handle):
        n = T.int64()
        x = T.match_buffer(px, (n, 3), "float32")
        y = T.match_buffer(py, (n, 3), "float32")
        for block in T.thread_binding(n, thread="blockIdx.x"):
            for thread in T.thread_binding(T.int64(3), thread="threadIdx.x"):
                y[block, thread] = x[block, thread] + T.float32(1)

    for n in (0, 1, 5):
        x = rng.standard_normal((n, 3)).astype("float32")
        np.testing.assert_array_equal(run(main, x, np.zeros_like(x))[1], x + 1)


def test_what_glsl_lacks_is_refused_by_name():
    func = elementwise("float32", "float32", lambda v: T.call_pure_extern("float32", "magic", v))
    with pytest.raises(RuntimeError, match="kernel main_kernel: GLSL has no function magic"):
        compiled(func)


def test_what_one_scope_knows_of_a_name_does_not_hold_in_another():
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((65,), "float32"), y: T.Buffer((128,), "float32")):
        for thread in T.thread_binding(16, thread="threadIdx.x"):
            for half in T.serial(2):
                if half == 0:
                    start = thread * 4
                    y[T.ramp(start, 1, 4)] = x[T.ramp(start, 1, 4)]
                else:
                    start = thread * 4 + 1
                    y[T.ramp(thread * 4 + 64, 1, 4)] = x[T.ramp(start, 1, 4)]

    x = rng.standard_normal(65).astype("float32")
    got = run(main, x, np.zeros(128, "float32"))[1]
    np.testing.assert_array_equal(got, np.concatenate([x[:-1], x[1:]]))

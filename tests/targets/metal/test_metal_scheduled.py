"""What no kernel rule takes: operators that dlight schedules, their Metal source run on the CPU."""

import metal_shim
import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import relax as R

from llmc.targets.gpu.schedule import schedule_rules

pytestmark = pytest.mark.skipif(
    metal_shim.COMPILER is None, reason="needs g++: apt-get install g++"
)
ROWS = 37


def angles(positions, frequencies):
    """Of rotations, as models compute them: element by element, fused to one kernel."""
    turns = relax.op.multiply(relax.op.astype(positions, "float32"), frequencies)
    return relax.op.cos(relax.op.concat([turns, turns], axis=2))


def columns(x):
    """Some of them."""
    return relax.op.strided_slice(x, axes=[2], begin=[32], end=[96])


T = tvm.tirx.Var("T", "int64")
OPERATORS = {
    "angles": (angles, [((1, T, 1), "int32"), ((1, 1, 8), "float32")]),
    "columns": (columns, [((1, T, 128), "float32")]),
    "gathered": (lambda x, i: relax.op.take(x, i, axis=0), [((T, 50), "float32"), ((5,), "int32")]),
    "total": (lambda x: relax.op.sum(x, axis=1), [((T, 300), "float32")]),
    "softmax": (lambda x: relax.op.nn.softmax(x, axis=1), [((T, 70), "float32")]),
}


@pytest.fixture(scope="module")
def scheduled():
    """(rules by kernel, kernels): the operators legalized and fused as a compile does it."""
    builder = relax.BlockBuilder()
    for name, (make, types) in OPERATORS.items():
        arguments = [relax.Var(f"x{i}", R.Tensor(s, d)) for i, (s, d) in enumerate(types)]
        with builder.function(f"call_{name}", arguments):
            with builder.dataflow():
                out = builder.emit_output(make(*arguments))
            builder.emit_func_output(out)
    passes = [relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern()]
    passes += [relax.transform.FuseOps(), relax.transform.FuseTIR()]
    mod = tvm.transform.Sequential(passes)(builder.get())
    target, rules, functions = metal_shim.host_target(), {}, {}
    for variable, func in mod.functions_items():
        if not isinstance(func, tvm.tirx.PrimFunc):
            continue
        name = variable.name_hint
        with target:
            made = ((rule, schedule(func)) for rule, schedule in schedule_rules(target))
            rules[name], functions[name] = next((r, f) for r, f in made if f is not None)
    return rules, metal_shim.build(functions)


def test_each_of_dlights_rules_makes_one(scheduled):
    rules, _ = scheduled
    assert set(rules.values()) == {
        *("dlight.fallback", "dlight.reduction", "dlight.general_reduction")
    }


def run(scheduled, prefix, *arrays):
    """The last array, after the one kernel whose name begins so."""
    rules, kernels = scheduled
    [name] = [name for name in rules if name.startswith(prefix)]
    out = np.full_like(arrays[-1], np.nan)
    (found,) = metal_shim.run(kernels[name], *arrays[:-1], out, outputs=[-1])
    return found


def normal(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def test_element_by_element(scheduled):
    positions = np.arange(ROWS, dtype=np.int32).reshape(1, ROWS, 1)
    frequencies = np.linspace(1, 0.01, 8, dtype=np.float32).reshape(1, 1, 8)
    out = np.empty((1, ROWS, 16), np.float32)
    found = run(scheduled, "fused_cast_multiply", positions, frequencies, out)
    turns = positions.astype(np.float64) * frequencies
    # An angle of 36 is rounded to 2^-19.
    np.testing.assert_allclose(found, np.cos(np.concatenate([turns] * 2, axis=2)), atol=4e-6)
    x = normal(1, ROWS, 128)
    found = run(scheduled, "strided_slice", x, np.empty((1, ROWS, 64), np.float32))
    np.testing.assert_array_equal(found, x[:, :, 32:96])
    table, rows = normal(ROWS, 50), np.array([3, 0, 36, 3, 7], np.int32)
    found = run(scheduled, "take", table, rows, np.empty((5, 50), np.float32))
    np.testing.assert_array_equal(found, table[rows])


def test_sums_of_rows(scheduled):
    x = normal(ROWS, 300)
    found = run(scheduled, "sum", x, np.empty(ROWS, np.float32))
    np.testing.assert_allclose(found, x.astype(np.float64).sum(axis=1), atol=2e-5)  # 300 roundings


def test_softmax_of_rows(scheduled):
    x = 5 * normal(ROWS, 70)
    found = run(scheduled, "softmax", x, np.empty((ROWS, 70), np.float32))
    powers = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found, powers / powers.sum(axis=1, keepdims=True), atol=1e-6)

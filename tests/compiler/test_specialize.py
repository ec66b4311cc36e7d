import pytest
import tvm
from graphs import L, T
from tvm import relax
from tvm.ir import assert_structural_equal

from llmc.compiler.passes.dispatch import MAX_TOKENS
from llmc.compiler.passes.lower_attention import STEP_INPUTS
from llmc.compiler.passes.specialize import entry_name, specialize

S, B = (tvm.tirx.Var(n, "int64") for n in "SB")
SHAPES = {
    "input_ids": [T],
    "positions": [T],
    "q_starts": [S + 1],
    "kv_lens": [S],
    "block_tables": [1, S, B],
    "slots": [1, T],
    "state_slots": [S],
    "logits_rows": [L],
}


def step(tokens=T, rows=L):
    """A function of the step's signature; its result depends on T and on L."""
    symbols = {T: tokens, L: rows}
    shapes = {n: [symbols.get(e, e) for e in shape] for n, shape in SHAPES.items()}
    params = [relax.Var(n, relax.TensorType(shapes[n], "int32")) for n in STEP_INPUTS]
    builder = relax.BlockBuilder()
    with builder.function("step", params):
        with builder.dataflow():
            ids = builder.emit(relax.op.astype(params[0], "float32"))
            rows = builder.emit(relax.op.take(ids, params[-1], 0, mode="clip"))
            out = builder.emit_output(relax.op.expand_dims(rows, 1))
        builder.emit_func_output(out)
    return builder.get().with_attr("llmc.note", "kept")


def run(max_tokens, **bounds):
    given = {"max_sequences": 4, "max_logits_rows": 6, **bounds}
    return specialize(step(), max_tokens=max_tokens, **given)


def plain(func):
    """Without what specialize records."""
    for name in (MAX_TOKENS, "tir_var_upper_bound", "tir_var_lower_bound", "global_symbol"):
        func = func.without_attr(name)
    return func


def test_each_range_of_tokens_gets_an_entry_point_and_the_last_is_step():
    after = run([1, 8, 64])
    assert sorted(g.name_hint for g in after.get_global_vars()) == ["step", "step_1", "step_8"]
    assert [int(after[n].attrs[MAX_TOKENS]) for n in ("step_1", "step_8", "step")] == [1, 8, 64]
    relax.analysis.well_formed(after)  # raises
    assert str(after.attrs["llmc.note"]) == "kept"


def test_one_token_is_a_static_shape_and_more_are_not():
    after = run([1, 8])
    one = plain(step(tokens=1, rows=1)["step"])
    assert_structural_equal(plain(after["step_1"]), one, map_free_vars=True)
    assert_structural_equal(plain(after["step"]), plain(step()["step"]), map_free_vars=True)


def test_bounds_are_the_smaller_of_the_tokens_and_the_limits():
    after = run([1, 3, 64])
    upper = {n: dict(after[n].attrs["tir_var_upper_bound"]) for n in ("step_1", "step_3", "step")}
    assert {n: {k: int(v) for k, v in b.items()} for n, b in upper.items()} == {
        "step_1": {"T": 1, "L": 1, "S": 1},
        "step_3": {"T": 3, "L": 3, "S": 3},
        "step": {"T": 64, "L": 6, "S": 4},
    }


def test_entry_points_share_no_variable():
    after = run([1, 8])
    first, second = ({p for p in after[n].params} for n in ("step_1", "step"))
    assert not first & second


def test_a_compile_for_single_tokens_has_one_entry_point():
    after = run([1])
    assert [g.name_hint for g in after.get_global_vars()] == ["step"]


@pytest.mark.parametrize(("bound", "is_last", "name"), [(8, False, "step_8"), (8, True, "step")])
def test_names_of_entry_points(bound, is_last, name):
    assert entry_name(bound, is_last) == name

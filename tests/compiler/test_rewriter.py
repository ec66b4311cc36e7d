import pytest
import tvm
from graphs import T, assert_becomes, graph, settled
from tvm import relax
from tvm.ir import assert_structural_equal

from llmc.compiler.rewriter import (
    apply_rule,
    bindings,
    count_uses,
    op_args,
    relax_functions,
    same_extent,
    same_shape,
    scalar,
    static_shape,
    with_params,
)
from llmc.errors import UnsupportedError

X = [1, T, 8]


def test_a_rule_sees_operands_that_are_rewritten_already():
    """abs → negative, negative → exp: the second sees what the first made."""

    def rule(call, scope):
        args = op_args(call, "relax.abs")
        if args is not None:
            return relax.op.negative(args[0])
        args = op_args(call, "relax.sqrt")
        if args is not None and op_args(scope.value(args[0]), "relax.negative"):
            return relax.op.exp(args[0])
        return None

    def before(emit, x):
        return relax.op.sqrt(emit(relax.op.abs(x)))

    def expected(emit, x):
        return relax.op.exp(emit(relax.op.negative(x)))

    assert_becomes(lambda mod: apply_rule(mod, rule), graph(before, x=X), graph(expected, x=X))


def test_what_became_dead_is_removed():
    def rule(call, scope):
        args = op_args(call, "relax.negative")
        return None if args is None else op_args(scope.value(args[0]), "relax.abs")[0]

    def before(emit, x):
        return relax.op.negative(emit(relax.op.abs(x)))

    mod = apply_rule(graph(before, x=X), rule)
    assert not [b for b in bindings(mod["main"]) if isinstance(b.value, relax.Call)]


def test_emitted_values_stand_before_the_call_that_is_replaced():
    def rule(call, scope):
        args = op_args(call, "relax.abs")
        return None if args is None else relax.op.exp(scope.emit(relax.op.negative(args[0])))

    def expected(emit, x):
        return relax.op.exp(emit(relax.op.negative(x)))

    before = graph(lambda emit, x: relax.op.abs(x), x=X)
    assert_becomes(lambda mod: apply_rule(mod, rule), before, graph(expected, x=X))


def test_a_rule_knows_how_often_a_variable_is_read():
    found = []

    def rule(call, scope):
        if op_args(call, "relax.exp"):
            made = scope.emit(relax.op.abs(call.args[0]))
            found.append((scope.used_once(call.args[0]), scope.used_once(made)))
        return None

    def body(emit, x):
        once, twice = emit(relax.op.abs(x)), emit(relax.op.negative(x))
        total = emit(relax.op.add(emit(relax.op.exp(once)), emit(relax.op.exp(twice))))
        return relax.op.add(total, twice)

    apply_rule(graph(body, x=X), rule)
    # Nothing is known of what a rule made itself.
    assert found == [(True, False), (False, False)]


def test_a_rule_knows_which_variable_is_bound():
    mod = graph(lambda emit, x: relax.op.exp(emit(relax.op.abs(x))), x=X)
    variables = [b.var for b in bindings(mod["main"])]
    found = []
    apply_rule(mod, lambda call, scope: found.append(scope.target))
    assert found == variables


def test_one_call_that_reads_a_variable_twice_counts_twice():
    mod = graph(lambda emit, x: relax.op.add(x, x), x=X)
    uses = count_uses(mod["main"])
    assert uses[mod["main"].params[-1]] == 2


def test_the_result_counts_as_read():
    mod = graph(lambda emit, x: relax.op.abs(x), x=X)
    [binding] = bindings(mod["main"])
    assert count_uses(mod["main"])[binding.var] == 1


def test_an_error_of_a_rule_comes_through_unchanged():
    error = UnsupportedError("operator abs is not for today", hint="tomorrow")

    def rule(call, scope):
        raise error

    with pytest.raises(UnsupportedError) as raised:
        apply_rule(graph(lambda emit, x: relax.op.abs(x), x=X), rule)
    assert raised.value is error


def test_primfuncs_are_left_alone():
    mod = graph(lambda emit, x: relax.op.abs(x), x=[1, 4, 8])
    lowered = relax.transform.LegalizeOps()(mod)
    [func] = [f for _, f in lowered.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    after = apply_rule(lowered, lambda call, scope: None)
    assert_structural_equal(after["tir_abs"], func)
    assert [g.name_hint for g, _ in relax_functions(after)] == ["main"]


def test_other_parameters_leave_the_body_alone():
    mod = settled(graph(lambda emit, x: relax.op.abs(x), x=X))
    func = mod["main"]
    fewer = with_params(func, list(func.params)[-1:])
    assert fewer.body.same_as(func.body)
    assert [p.name for p in fewer.params] == ["x"]


def test_scalars_and_shapes_are_read():
    x = relax.Var("x", relax.TensorType([1, T, 8], "float32"))
    y = relax.Var("y", relax.TensorType([1, T + 1, 8], "float32"))
    flat = relax.Var("flat", relax.TensorType([T, 8], "float32"))
    assert static_shape(x) == [1, None, 8]
    assert scalar(relax.const(0.5, "float32")) == 0.5
    assert scalar(relax.const([[2.0]], "float32")) == 2.0
    assert scalar(relax.const([1.0, 1.0], "float32")) is None
    assert scalar(x) is None
    assert same_shape(x, x)
    assert not same_shape(x, y)
    assert not same_shape(x, flat)
    assert same_extent(x, y, 2)
    assert not same_extent(x, y, 1)


def test_arguments_are_given_for_the_named_operator_only():
    x = relax.Var("x", relax.TensorType([4], "float32"))
    call = relax.op.add(x, x)
    assert op_args(call, "relax.add") == [x, x]
    assert op_args(call, "relax.multiply") is None
    assert op_args(x, "relax.add") is None

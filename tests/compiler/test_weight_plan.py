from graphs import T, graph

from llmc import dialect
from llmc.compiler.weight_plan import WeightSpec, attach, weights_of
from llmc.compiler.weights import Argument, arguments

MOD = graph(lambda emit, x, a, b: dialect.Linear().call(x, a, b), x=[1, T, 8], a=[4, 8], b=[4])
PLAN = {
    "a": WeightSpec(sources=["q", "k"], format="q4_k", transposed=True, layout="panel16", part=1),
    "b": WeightSpec(sources=["bias"]),
}


def test_a_plan_travels_with_its_module():
    assert weights_of(attach(MOD, PLAN)) == PLAN
    assert weights_of(attach(attach(MOD, PLAN), {"b": PLAN["b"]})) == {"b": PLAN["b"]}


def test_arguments_are_those_of_the_plan_in_the_functions_order():
    plan = {"b": PLAN["b"], "a": PLAN["a"]}
    found = arguments(list(MOD["main"].params), plan)
    assert found == [
        Argument(name="a", spec=PLAN["a"], shape=(4, 8), dtype="float32"),
        Argument(name="b", spec=PLAN["b"], shape=(4,), dtype="float32"),
    ]
    assert [a.num_bytes for a in found] == [128, 16]

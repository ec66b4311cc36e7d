import pytest
from graphs import T, assert_structural_equal, graph, settled
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.dispatch import MAX_TOKENS
from llmc.compiler.passes.fuse_around import fuse_around
from llmc.compiler.rewriter import relax_functions

PARAMS = {"x": [1, 1, 8], "g": [8], "w": [32, 8], "b": [32], "r": [1, 1, 32]}
NORM = dialect.RmsNorm(eps=1e-5, offset=1.0)


def bounded(mod, tokens):
    """`mod` with its function as the entry point of so many tokens."""
    out = mod.clone()
    for name, func in relax_functions(mod):
        out[name] = func.with_attr(MAX_TOKENS, tokens)
    return out


def fused(mod, tokens=1, takes=lambda fmt, m, k, max_tokens: max_tokens == 1):
    return fuse_around(bounded(mod, tokens), takes)


def layer(emit, x, g, w, b, r, *, gate=None, residual=False):
    """linear(rms_norm(x)), then a gated activation."""
    normed = emit(NORM.call(x, g))
    product = dialect.Linear(format="w4-g32").call(normed, w, b, r if residual else None)
    return dialect.GatedActivation(kind=gate).call(emit(product)) if gate else product


def expected(**options):
    op = dialect.FusedLinear(eps=1e-5, offset=1.0, format="w4-g32", **options)
    return graph(lambda emit, x, g, w, b, r: op.call(x, g, w, b, None), **PARAMS)


def test_norm_product_and_gate_of_one_token_are_one_operator():
    found = fused(graph(lambda emit, **p: layer(emit, **p, gate="silu"), **PARAMS))
    assert_structural_equal(found, bounded(settled(expected(gate="silu")), 1), map_free_vars=True)


def test_a_norm_alone_goes_into_the_product():
    found = fused(graph(layer, **PARAMS))
    assert_structural_equal(found, bounded(settled(expected()), 1), map_free_vars=True)


def operators(mod):
    [(_, func)] = list(relax_functions(mod))
    calls = [binding.value for block in func.body.blocks for binding in block.bindings]
    return [match.op.name for match in map(dialect.match_any, calls) if match is not None]


def test_a_gate_without_a_norm_is_fused_and_a_residual_keeps_it_out():
    def plain(emit, x, g, w, b, r, residual=None):
        return dialect.GatedActivation(kind="relu").call(
            emit(dialect.Linear().call(x, w, None, residual))
        )

    assert operators(fused(graph(plain, **PARAMS))) == ["fused_linear"]
    with_residual = graph(lambda emit, **p: plain(emit, **p, residual=p["r"]), **PARAMS)
    assert operators(fused(with_residual)) == ["linear", "gated_activation"]


def test_entry_points_of_more_tokens_and_products_that_the_target_lacks_stay():
    before = graph(lambda emit, **p: layer(emit, **p, gate="silu"), **PARAMS)
    kept = ["rms_norm", "linear", "gated_activation"]
    assert operators(fused(before, tokens=8)) == kept
    asked = []

    def takes(fmt, m, k, max_tokens):
        asked.append((fmt.name, m, k, max_tokens))
        return False

    assert operators(fused(before, takes=takes)) == kept
    assert set(asked) == {("w4-g32", 32, 8, 1)}


def test_a_norm_that_is_read_twice_stays():
    def body(emit, x, g, w, b, r):
        normed = emit(NORM.call(x, g))
        product = emit(dialect.Linear().call(normed, w, b, r))
        return relax.op.sum(normed) + relax.op.sum(product)

    assert operators(fused(graph(body, **PARAMS))) == ["rms_norm", "linear"]


@pytest.mark.parametrize("rows", [T])
def test_the_numbers_of_tokens_may_be_symbolic_elsewhere(rows):
    before = graph(lambda emit, x, g: NORM.call(x, g), x=[1, rows, 8], g=[8])
    assert operators(fused(before, tokens=64)) == ["rms_norm"]


def test_entry_points_of_many_tokens_are_fused_where_the_target_takes_them():
    before = graph(lambda emit, **p: layer(emit, **p, gate="silu"), **PARAMS)
    many = fused(before, tokens=64, takes=lambda fmt, m, k, max_tokens: max_tokens > 8)
    assert operators(many) == ["fused_linear"]

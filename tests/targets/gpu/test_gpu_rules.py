"""Which kernel takes which operator, and in which order it takes the operands."""

import pytest
import tvm
from tvm import relax

from llmc import dialect
from llmc.targets.base import Site
from llmc.targets.gpu.parameters import GpuParameters
from llmc.targets.gpu.rules import kernel_rules, key_page, value_page

T, P, S, B = (tvm.tirx.Var(n, "int64") for n in "TPSB")
FEW = 8


def site(op, max_tokens=256, tokens=None, **shapes):
    """A call whose operands have these shapes, float32 but for the integer ones."""
    integers = ("ids", "slots", "expert_ids", "q_starts", "kv_lens", "block_tables")
    types = {
        name: relax.TensorType(shape, "int32" if name in integers else "float32")
        for name, shape in shapes.items()
    }
    return Site(
        op=op, types=types, max_tokens=max_tokens, tokens=tokens, num_groups=1, page_size=16
    )


def chosen(call):
    for name, rule in kernel_rules(GpuParameters(), FEW):
        kernel = rule(call)
        if kernel is not None:
            return name, kernel
    return None


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "rule"),
    [(1, 1, "gpu.gemv"), (None, FEW, "gpu.few"), (None, 256, "gpu.gemm")],
)
def test_products_are_chosen_by_their_number_of_tokens(tokens, max_tokens, rule):
    rows = T if tokens is None else tokens
    call = site(
        dialect.Linear(format="q4_1"),
        max_tokens,
        tokens,
        x=[1, rows, 64],
        residual=[1, rows, 40],
        weight=[40, 64],
        bias=[40],
    )
    name, kernel = chosen(call)
    assert name == rule
    assert kernel.operands == ("x", "weight", "bias", "residual")
    # The codes, scales and minimums of the weight and the output come to it.
    assert len(kernel.func.params) == 7


@pytest.mark.parametrize(("max_tokens", "rule"), [(FEW, "gpu.few_experts"), (256, "gpu.experts")])
def test_experts_are_chosen_by_the_number_of_tokens(max_tokens, rule):
    call = site(
        dialect.GroupedLinear(format="f16"),
        max_tokens,
        x=[T, 64],
        weight=[6, 40, 64],
        expert_ids=[T, 2],
    )
    name, kernel = chosen(call)
    assert name == rule
    assert kernel.operands == ("x", "expert_ids", "weight")


def pages(head_dim):
    return {
        "k_pages": [P, *key_page(2, head_dim, "float32", 16)],
        "v_pages": [P, *value_page(2, head_dim, "float32", 16)],
    }


ATTENTION = {
    "query": [1, T, 4, 8],
    "q_starts": [S + 1],
    "kv_lens": [S],
    "block_tables": [1, S, B],
    **pages(8),
}
FUSED = dialect.RopeKvWrite(
    group=0, num_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=8, rotary_dim=8
)
OTHERS = {
    "gpu.attention": (
        dialect.PagedAttention(group=0, scale=1.0, v_head_dim=8),
        ATTENTION,
        (None,),
    ),
    "gpu.embedding": (dialect.Embedding(), {"ids": [1, T], "weight": [50, 8]}, (None,)),
    "gpu.rope": (
        FUSED,
        {"qkv": [1, T, 64], "cos": [1, T, 8], "sin": [1, T, 8], "slots": [1, T], **pages(8)},
        (None, "k_pages", "v_pages"),
    ),
    "gpu.kv_write": (
        dialect.KvWrite(group=0),
        {"key": [1, T, 2, 8], "value": [1, T, 2, 8], "slots": [1, T], **pages(8)},
        ("k_pages", "v_pages"),
    ),
    "gpu.gated_activation": (dialect.GatedActivation(kind="silu"), {"x": [1, T, 16]}, (None,)),
    "gpu.top_k": (dialect.TopK(k=2), {"x": [T, 9]}, (None, None)),
}


@pytest.mark.parametrize("rule", OTHERS)
def test_every_other_operator_has_its_kernel(rule):
    op, shapes, in_place = OTHERS[rule]
    name, kernel = chosen(site(op, **shapes))
    assert name == rule
    assert kernel.operands == tuple(shapes)
    assert kernel.in_place == in_place


@pytest.mark.parametrize(
    ("op", "operands", "outputs"),
    [
        (dialect.RmsNorm(eps=1e-5), ("x", "weight"), 1),
        (dialect.AddRmsNorm(eps=1e-5), ("x", "residual", "weight"), 2),
        (dialect.LayerNorm(eps=1e-5), ("x", "weight", "bias"), 1),
    ],
)
def test_norms_have_their_kernels(op, operands, outputs):
    shapes = {n: [1, T, 24] if n in ("x", "residual") else [24] for n in operands}
    name, kernel = chosen(site(op, **shapes))
    assert (name, kernel.operands) == ("gpu.norm", operands)
    assert len(kernel.func.params) == len(operands) + outputs


def test_products_of_integers_are_left_to_others():
    call = site(dialect.QuantizeActivations(block=32, unit=32, factor=1), x=[1, T, 64])
    assert chosen(call) is None


def test_pages_hold_every_type_of_cache():
    # 10 key features fill three vectors of four float32, two of eight float16, one of 16 int8.
    sizes = {
        kv: (key_page(2, 10, kv, 16), value_page(2, 10, kv, 16)) for kv in ("float32", "float16")
    }
    assert sizes == {
        "float32": ([2, 12 * 16], [2, 160]),
        "float16": ([2, 16 * 16], [2, 160]),
    }
    # int8 pages have a float32 scale a token.
    assert (key_page(2, 10, "int8", 16), value_page(2, 10, "int8", 16)) == (
        [2, 16 * 16 + 64],
        [2, 160 + 64],
    )

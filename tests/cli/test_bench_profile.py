"""What `llmc bench --profile` says a kernel has to read and compute."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from toy_artifact import toy_manifest

from llmc.artifact import CacheGroup, CacheTensor, WeightTensor
from llmc.cli.kernel_cost import Argument, CostModel, KernelCost, Limits, visible_tokens
from llmc.runtime.step import StepInputs

ITEM_BYTES = {"float32": 4, "float16": 2, "int32": 4, "int8": 1}


def tensor(address: int, shape: tuple[int, ...], dtype: str = "float32") -> Argument:
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    return Argument(address=address, shape=shape, dtype=dtype, num_bytes=num_bytes)


def weight(name: str, shape: tuple[int, ...], dtype: str, fmt: str) -> WeightTensor:
    return WeightTensor(
        name=name,
        file="weights-00001.safetensors",
        dtype=dtype,
        shape=list(shape),
        format=fmt,
        layout="panel16",
        sources=[name],
        num_bytes=math.prod(shape) * ITEM_BYTES[dtype],
    )


def step(q_lens: list[int], kv_lens: list[int], *, columns: int = 4) -> StepInputs:
    num_tokens, num_sequences = sum(q_lens), len(q_lens)
    zeros = np.zeros(num_tokens, np.int32)
    return StepInputs(
        input_ids=zeros,
        positions=zeros,
        q_starts=np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
        kv_lens=np.array(kv_lens, np.int32),
        block_tables=np.zeros((1, num_sequences, columns), np.int32),
        slots=np.zeros((1, num_tokens), np.int32),
        state_slots=np.zeros(num_sequences, np.int32),
        logits_rows=np.zeros(1, np.int32),
        num_decodes=0,
        max_q_len=max(q_lens),
        max_kv_len=max(kv_lens),
    )


# 64 outputs, 32 inputs: 4 panels of 16 rows, 4 words of 8 codes, one scale of 32 codes a row.
Q4_0 = [
    weight("w.codes", (4, 4, 16), "int32", "q4_0"),
    weight("w.scales", (4, 1, 16), "float16", "q4_0"),
]
Q4_0_BYTES = 64 * 32 // 2 + 64 * 2


def cost(
    weights: list[WeightTensor], arguments: list[Argument], inputs: StepInputs, **changes: object
) -> KernelCost:
    """`weights` lie at addresses 1000, 1001, …; caches at 2000, 2001, …"""
    manifest = dataclasses.replace(toy_manifest(), weights=weights, caches=[], **changes)
    model = CostModel(
        manifest,
        caches=[2000 + i for i in range(len(manifest.caches))],
        weights=[1000 + i for i in range(len(weights))],
    )
    return model.cost(arguments, inputs)


def packed(weights: list[WeightTensor]) -> list[Argument]:
    return [tensor(1000 + i, tuple(w.shape), w.dtype) for i, w in enumerate(weights)]


def test_a_product_reads_its_weights_and_does_two_operations_a_weight_and_row() -> None:
    arguments = [tensor(1, (1, 3, 32)), *packed(Q4_0), tensor(2, (1, 3, 64))]
    product = cost(Q4_0, arguments, step([3], [3]))
    assert product.memory_bytes == Q4_0_BYTES
    assert product.operations == 2 * 3 * 64 * 32
    assert product.activation_bytes == 4 * (3 * 32 + 3 * 64)
    assert product.precision == "f32"


def test_a_residual_added_in_place_counts_once() -> None:
    arguments = [tensor(1, (1, 3, 32)), *packed(Q4_0), tensor(2, (1, 3, 64)), tensor(2, (1, 3, 64))]
    assert cost(Q4_0, arguments, step([3], [3])).activation_bytes == 4 * (3 * 32 + 3 * 64)


def test_the_precision_is_that_of_the_factors() -> None:
    coded = [tensor(1, (1, 3, 32), "int8"), tensor(3, (1, 3, 1)), *packed(Q4_0)]
    inputs = step([3], [3])
    assert cost(Q4_0, [*coded, tensor(2, (1, 3, 64))], inputs).precision == "int8"
    bf16 = [weight("w.values", (4, 16, 16), "int32", "bf16")]
    arguments = [tensor(1, (1, 3, 32)), *packed(bf16), tensor(2, (1, 3, 64))]
    product = cost(bf16, arguments, inputs)
    assert product.precision == "bf16"
    assert product.operations == 2 * 3 * 64 * 32


def test_a_look_up_reads_its_rows_and_not_the_table() -> None:
    arguments = [tensor(1, (1, 3), "int32"), *packed(Q4_0), tensor(2, (1, 3, 32))]
    look_up = cost(Q4_0, arguments, step([3], [3]))
    assert look_up.memory_bytes == pytest.approx(Q4_0_BYTES * 3 / 64)
    assert look_up.operations == 0


def test_rows_taken_from_activations_count_as_they_are_taken() -> None:
    arguments = [tensor(1, (1, 100, 32)), tensor(2, (2,), "int32"), tensor(3, (1, 2, 32))]
    assert cost([], arguments, step([100], [100])).activation_bytes == 2 * (2 * 32 * 4) + 2 * 4


def test_the_rows_whose_largest_is_found_are_read_whole() -> None:
    arguments = [tensor(1, (2, 100)), tensor(2, (2,), "int32"), tensor(3, (2,), "int32")]
    assert cost([], arguments, step([1, 1], [9, 9])).activation_bytes == 4 * (2 * 100 + 2 + 2)


def test_experts_that_no_row_can_choose_are_not_read() -> None:
    stack = [dataclasses.replace(w, shape=[8, *w.shape], num_bytes=8 * w.num_bytes) for w in Q4_0]
    arguments = [
        tensor(1, (1, 3, 32)),
        tensor(3, (3, 2), "int32"),
        *packed(stack),
        tensor(2, (6, 64)),
    ]
    product = cost(stack, arguments, step([3], [3]))
    assert product.memory_bytes == pytest.approx(6 * Q4_0_BYTES)
    assert product.operations == 2 * 6 * 64 * 32


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_visible_tokens_are_counted_as_the_window_is_defined(window: int | None) -> None:
    q_lens, kv_lens = [1, 1, 5, 7], [9, 1, 5, 20]
    seen, pairs = set(), 0
    for sequence, (q, kv) in enumerate(zip(q_lens, kv_lens, strict=True)):
        for i in range(kv - q, kv):  # docs/shapes.md: i sees j with i - window < j <= i
            visible = [j for j in range(i + 1) if window is None or i - window < j]
            pairs += len(visible)
            seen |= {(sequence, j) for j in visible}
    assert visible_tokens(step(q_lens, kv_lens), window) == (len(seen), pairs)


def attention_model(activations: str = "float32") -> CostModel:
    """4 query heads and 2 KV heads of size 8, float16 pages of 16 tokens."""
    pages = [
        CacheTensor(
            name=name,
            layer=0,
            group=0,
            kind="paged",
            dtype="float16",
            page_shape=[2, 8, 16],
            page_bytes=512,
        )
        for name in ("k", "v")
    ]
    groups = [CacheGroup(name="full", window=None, page_size=16)]
    manifest = dataclasses.replace(
        toy_manifest(), groups=groups, caches=pages, activation_dtype=activations
    )
    return CostModel(manifest, caches=[2000, 2001], weights=[])


PAGES = [tensor(2000, (99, 2, 8, 16), "float16"), tensor(2001, (99, 2, 16, 8), "float16")]


def test_attention_reads_the_context_and_not_the_pool() -> None:
    inputs = step([1, 3], [40, 3])
    tables = tensor(5, inputs.block_tables.shape, "int32")
    arguments = [tensor(1, (1, 4, 4, 8)), tables, *PAGES, tensor(2, (1, 4, 4, 8))]
    attention = attention_model().cost(arguments, inputs)
    assert attention.memory_bytes == 43 * (2 * 2 * 8 * 2)  # K and V, heads, size, bytes
    # Two products of 8 multiply-adds for each of 4 heads and each pair: 40 and 1 + 2 + 3.
    assert attention.operations == 2 * (2 * 8 * 4) * 46
    assert attention.precision == "f32"
    assert attention_model("int8").cost(arguments, inputs).precision == "bf16"


def test_writing_to_the_cache_moves_the_new_tokens_only() -> None:
    inputs = step([1, 3], [40, 3])
    arguments = [tensor(1, (1, 4, 64)), *PAGES, tensor(2, (1, 4, 4, 8))]
    write = attention_model().cost(arguments, inputs)
    assert write.memory_bytes == 4 * (2 * 2 * 8 * 2)
    assert write.operations == 0


def test_the_floor_is_the_slowest_of_memory_caches_and_arithmetic() -> None:
    limits = Limits(
        memory_bytes_per_s=10, cache_bytes_per_s=100, operations_per_s={"f32": 5, "int8": 20}
    )

    def floor(memory: float, activation: float, operations: float, precision: str) -> float:
        return limits.floor_s(
            KernelCost(
                memory_bytes=memory,
                activation_bytes=activation,
                operations=operations,
                precision=precision,
            )
        )

    assert floor(100, 100, 10, "f32") == 10  # memory
    assert floor(100, 5000, 10, "f32") == 50  # caches
    assert floor(100, 100, 80, "f32") == 16  # arithmetic
    assert floor(10, 0, 80, "int8") == 4
    assert floor(10, 0, 80, "bf16") == 16  # no such instruction: float32's

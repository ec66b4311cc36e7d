"""The reference implementation with weights that come and go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.compiler.streamed_model import Rows, StreamedModel, _RowsTensor
from llmc.models.source import ModelSource

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_read_one_by_one_and_only_those_that_tokens_chose(kind: str) -> None:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **SIZES, **({"head_dim": 8} if kind == "gpt_oss" else {}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    arrays = {n: p.detach().numpy() for n, p in model.named_parameters()}
    source = ModelSource(
        name=kind,
        config=config,
        tensors={},
        tokenizer_json=None,
        chat_template=None,
        bos_token_id=None,
        stop_token_ids=[],
        generation_config=None,
    )
    read: list[tuple[str, int]] = []

    def values(name: str) -> np.ndarray | Rows:
        array = arrays[name]
        if array.ndim < 3:
            return array

        def matrix(index: int, rows: slice) -> np.ndarray:
            read.append((name, index))
            return array[index, rows]

        return Rows(shape=array.shape, read=matrix)

    ids = np.array([[5, 9, 5]])
    found = StreamedModel(source, values).logits(ids)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    stacks = [n for n, array in arrays.items() if array.ndim == 3]
    assert len(stacks) == 4
    assert len(set(read)) == len(read)  # each once
    assert {name for name, _ in read} == set(stacks)
    # Two tokens choose two experts each: at most four, and two at least, in each layer.
    assert all(2 <= sum(name == s for name, _ in read) <= 4 for s in stacks)


def rows_of(array: np.ndarray, read: list[tuple[int, slice]] | None = None) -> Rows:
    """An array's rows, and which of them were read."""
    matrices = array if array.ndim == 3 else array[None]

    def rows(index: int, wanted: slice) -> np.ndarray:
        if read is not None:
            read.append((index, wanted))
        return matrices[index, wanted]

    return Rows(shape=array.shape, read=rows)


def test_what_is_no_index_gets_all_matrices() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensor = _RowsTensor(rows_of(array))
    assert tensor.shape == (2, 3, 4)
    x = torch.ones(2, 1, 3)
    torch.testing.assert_close(torch.bmm(x, tensor), x @ torch.from_numpy(array))
    torch.testing.assert_close(tensor[1].clone(), torch.from_numpy(array[1]))
    torch.testing.assert_close(tensor[:, 0], torch.from_numpy(array[:, 0]))


def test_a_product_reads_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.compiler.streamed_model._BLOCK_VALUES", 40)
    rng = np.random.default_rng(0)
    array = rng.normal(size=(2, 11, 16)).astype(np.float32)
    read: list[tuple[int, slice]] = []
    weight = _RowsTensor(rows_of(array, read))[1]
    x, bias = torch.randn(3, 5, 16), torch.randn(11)
    for given in (None, bias):
        read.clear()
        found = torch.nn.functional.linear(x, weight, given)
        expected = torch.nn.functional.linear(x, torch.from_numpy(array[1]), given)
        torch.testing.assert_close(found, expected)
        assert read == [(1, slice(i, min(11, i + 2))) for i in range(0, 11, 2)]


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_look_up_reads_the_rows_of_its_tokens_once(max_norm: float | None) -> None:
    array = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    read: list[tuple[int, slice]] = []
    weight = _RowsTensor(rows_of(array, read))
    ids = torch.tensor([[7, 0, 7], [2, 2, 8]])
    found = torch.nn.functional.embedding(ids, weight, 0, max_norm)
    expected = torch.nn.functional.embedding(ids, torch.from_numpy(array.copy()), 0, max_norm)
    torch.testing.assert_close(found, expected)
    if max_norm is None:
        assert [rows.start for _, rows in read] == [0, 2, 7, 8]
        assert all(rows.stop == rows.start + 1 for _, rows in read)

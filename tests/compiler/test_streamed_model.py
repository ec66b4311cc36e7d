"""The reference implementation with weights that come and go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.compiler.streamed_model import Stack, StreamedModel
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

    def values(name: str) -> np.ndarray | Stack:
        array = arrays[name]
        if array.ndim < 3:
            return array

        def matrix(index: int) -> np.ndarray:
            read.append((name, index))
            return array[index]

        return Stack(shape=array.shape, read=matrix)

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


def test_what_is_no_index_gets_all_matrices() -> None:
    from llmc.compiler.streamed_model import _StackedTensor

    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensor = _StackedTensor(Stack(shape=array.shape, read=lambda index: array[index]))
    assert tensor.shape == (2, 3, 4)
    x = torch.ones(2, 1, 3)
    torch.testing.assert_close(torch.bmm(x, tensor), x @ torch.from_numpy(array))
    torch.testing.assert_close(tensor[1], torch.from_numpy(array[1]))
    torch.testing.assert_close(tensor[:, 0], torch.from_numpy(array[:, 0]))

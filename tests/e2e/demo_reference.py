"""The demo as transformers runs it: eager, float32, on the file's dequantized weights."""

from __future__ import annotations

import numpy as np
import torch
from greedy import Answer
from transformers import AutoModelForCausalLM

from llmc.models.source import open_source
from llmc.models.torch_numpy import to_torch


class DemoReference:
    """Logits and greedy continuations of the reference implementation."""

    def __init__(self, spec: str) -> None:
        source = open_source(spec)
        model = AutoModelForCausalLM.from_config(
            source.config, attn_implementation="eager", dtype=torch.float32
        )
        parameters = dict(model.named_parameters())
        assert set(parameters) == set(source.tensors)
        with torch.no_grad():
            for name, tensor in source.tensors.items():
                parameters[name].copy_(to_torch(tensor.read()))
        self._model = model.eval()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> np.ndarray:
        """`[T, V]` float32 after each token."""
        ids = torch.tensor([token_ids])
        return self._model(input_ids=ids, use_cache=False).logits[0].numpy()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], *, max_tokens: int) -> Answer:
        """The likeliest continuation, end tokens not heeded."""
        ids, cache = torch.tensor([prompt]), None
        token_ids, margins = [], []
        for _ in range(max_tokens):
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            best = out.logits[0, -1].topk(2)
            token_ids.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            ids = best.indices[None, :1]
        return Answer(token_ids, margins)

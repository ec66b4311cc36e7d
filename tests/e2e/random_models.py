"""The models that the tests compile: the demo, and random weights that compile in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

DEMO = "demo:smollm2"

# Llama's layers, with a vocabulary and a width that compile in seconds.
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def save_random_model(model_type: str, fields: dict, folder: Path) -> Path:
    """A folder with a model of random weights, as transformers writes it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialization, so that tokens differ and logits spread.
            parameter.normal_(0, 0.15 if parameter.dim() > 1 else 0.5)
    model.save_pretrained(folder)
    return folder

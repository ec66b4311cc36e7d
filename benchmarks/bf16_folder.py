"""A GGUF file as a folder of bfloat16 weights, for the peers that read nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmc.models.source import open_source
from llmc.models.torch_numpy import to_torch


def write_bf16_folder(gguf: Path, out: Path) -> None:
    """Writes config, tokenizer and the dequantized weights, rounded to bfloat16, to `out`."""
    source = open_source(str(gguf))
    partial = out.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    source.config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[source.config.model_type]]
    source.config.dtype = torch.bfloat16
    source.config.save_pretrained(partial)
    if source.tokenizer_json is not None:
        (partial / "tokenizer.json").write_bytes(source.tokenizer_json)
    weights = {
        name: to_torch(tensor.read()).to(torch.bfloat16) for name, tensor in source.tensors.items()
    }
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(out)

"""What a random model needs beside its shape."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A GGUF file with a tokenizer of 30 tokens and nothing else."""
    writer = gguf.GGUFWriter(tmp_path / "tokenizer.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", *(f"token{i}" for i in range(3, 30))])
    writer.add_token_types([1] * 30)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tokenizer.gguf"

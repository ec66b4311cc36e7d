"""`--quant keep` where a file's blocks cannot all be kept: what is left is float32, never wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_gguf import matrices_as, parameters, random_model, renamed, write_gguf

import llmc

LAYERS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
} | {
    f"transformer.h.#.{name}.{kind}": f"blk.#.{gguf_name}.{kind}"
    for name, gguf_name in LAYERS.items()
    for kind in ("weight", "bias")
}
METADATA = {
    "context_length": 64,
    "embedding_length": 64,
    "block_count": 2,
    "attention.head_count": 4,
    "feed_forward_length": 256,
    "attention.layer_norm_epsilon": 1e-5,
}


def as_stored(values: np.ndarray, type_: gguf.GGMLQuantizationType) -> np.ndarray:
    """What blocks of `type_` make of `values` `[M, K]`."""
    return gguf.quants.dequantize(gguf.quants.quantize(values, type_), type_)


@pytest.mark.parametrize("type_name", ["Q4_1", "Q8_0"])
def test_projections_that_a_file_holds_transposed_become_float32(
    tmp_path: Path, type_name: str
) -> None:
    """The file's blocks lie along the axis that the model's products do not sum over.

    Its Q4_1 could not be made again from the values, its Q8_0 would lose a second time.
    """
    type_ = gguf.GGMLQuantizationType[type_name]
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    model = random_model("gpt2", sizes).eval()
    written = {
        name: np.ascontiguousarray(values.T) if name.startswith("blk.") else values
        for name, values in renamed(parameters(model), NAMES, 2).items()
    }
    path = write_gguf(tmp_path / "m.gguf", "gpt2", METADATA, written, matrices_as(type_))
    result = llmc.compile(
        path, quant="keep-a16", kv="f32", out=tmp_path / "art", max_batch_tokens=32
    )

    formats = {s: w.format for w in result.manifest.weights for s in w.sources}
    matrices = {name: fmt for name, fmt in formats.items() if not name.endswith("bias")}
    kept = {name for name, fmt in matrices.items() if fmt == type_name.lower()}
    assert kept == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert {fmt for name, fmt in matrices.items() if name not in kept} == {"f32"}

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                values = parameter.numpy().T if ".h." in name else parameter.numpy()
                stored = as_stored(np.ascontiguousarray(values), type_)
                parameter.copy_(torch.from_numpy(stored.T if ".h." in name else stored))
        ids = np.random.default_rng(0).integers(0, 96, 20)
        expected = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    logits = llmc.Engine(tmp_path / "art").logits(ids.tolist())
    # Sums of a few hundred float32 products in another order; the logits are of size 10.
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)

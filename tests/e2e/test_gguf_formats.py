"""Every GGUF format that can be kept is loaded, compiled and verified, in one model of all."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_gguf import HALVES, parameters, random_blocks, random_model, renamed, write_gguf

import llmc
from llmc.models.source import open_source
from llmc.runtime.verify import verify
from llmc.targets.cpu.target import CpuTarget

SIZE = 256  # of everything, a super-block
LAYERS, HEADS, VOCABULARY = 2, 4, 96
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.#.input_layernorm.weight": "blk.#.attn_norm.weight",
    "model.layers.#.self_attn.q_proj.weight": "blk.#.attn_q.weight",
    "model.layers.#.self_attn.k_proj.weight": "blk.#.attn_k.weight",
    "model.layers.#.self_attn.v_proj.weight": "blk.#.attn_v.weight",
    "model.layers.#.self_attn.o_proj.weight": "blk.#.attn_output.weight",
    "model.layers.#.post_attention_layernorm.weight": "blk.#.ffn_norm.weight",
    "model.layers.#.mlp.gate_proj.weight": "blk.#.ffn_gate.weight",
    "model.layers.#.mlp.up_proj.weight": "blk.#.ffn_up.weight",
    "model.layers.#.mlp.down_proj.weight": "blk.#.ffn_down.weight",
    "lm_head.weight": "output.weight",
}
METADATA = {
    "context_length": 64,
    "embedding_length": SIZE,
    "block_count": LAYERS,
    "feed_forward_length": SIZE,
    "attention.head_count": HEADS,
    "attention.head_count_kv": HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": SIZE // HEADS,
}
IDS = np.random.default_rng(0).integers(0, VOCABULARY, 20)


@dataclass(frozen=True)
class Kept:
    path: Path
    formats: dict[str, str]  # of each matrix, by the parameter's name
    logits: np.ndarray  # of transformers with the dequantized weights


def scaled_blocks(name: str, rows: int, seed: int) -> tuple[gguf.GGMLQuantizationType, np.ndarray]:
    """Random blocks whose values have a deviation of about 1 / √K, so that the model is tame."""
    per_row = SIZE // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]][0]
    type_, blocks = random_blocks(name, rows, per_row, seed=seed)
    scale = 0.02 * SIZE**-0.5 / float(gguf.quants.dequantize(blocks, type_).std())
    return random_blocks(name, rows, per_row, seed=seed, scale=scale)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Two layers whose matrices take turns through all formats."""
    model = random_model(
        "llama",
        {
            "hidden_size": SIZE,
            "intermediate_size": SIZE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "vocab_size": VOCABULARY,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ).eval()
    tensors = renamed(parameters(model), NAMES, LAYERS)
    of_matrices = {}
    types = sorted(HALVES)
    for name, values in tensors.items():
        if values.ndim > 1:
            format_name = types[len(of_matrices) % len(types)]
            type_, blocks = scaled_blocks(format_name, len(values), len(of_matrices))
            of_matrices[name], tensors[name] = (type_, format_name), blocks
    path = write_gguf(
        tmp_path_factory.mktemp("kept") / "m.gguf",
        "llama",
        METADATA,
        tensors,
        lambda name, _: of_matrices.get(name, (gguf.GGMLQuantizationType.F32,))[0],
    )
    # Reading values is tested elsewhere, block by block.
    source = open_source(str(path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(source.tensors[name].read(), np.float32)))
        logits = model(input_ids=torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()
    formats = {
        parameter.replace("#", str(layer)): of_matrices[name.replace("#", str(layer))][1]
        for parameter, name in NAMES.items()
        for layer in range(LAYERS if "#" in parameter else 1)
        if name.replace("#", str(layer)) in of_matrices
    }
    return Kept(path, formats, logits)


@pytest.mark.parametrize(
    ("quant", "tolerance"),
    # Float activations: sums of 256 float32 products in another order. Bytes: eight products in a
    # row whose inputs are off by up to 1/254 of their block's largest, in logits of deviation 1.
    [
        ("keep-a16", 1e-3),
        pytest.param("keep-a8", 0.2, marks=pytest.mark.slow),
        pytest.param("keep", 0.2, marks=pytest.mark.slow),
    ],
)
def test_every_format_is_kept_and_proves_itself(
    kept: Kept, quant: str, tolerance: float, tmp_path: Path
) -> None:
    assert set(kept.formats.values()) == set(HALVES)
    if quant == "keep-a8" and "int8" not in CpuTarget().narrow_products:
        pytest.skip("this CPU has no dot products of bytes")

    result = llmc.compile(
        kept.path, quant=quant, kv="f32", out=tmp_path / "art", max_batch_tokens=32
    )

    stored = {s: w.format for w in result.manifest.weights for s in w.sources}
    assert {name: stored[name] for name in kept.formats} == kept.formats
    verify(tmp_path / "art").raise_if_failed()
    engine = llmc.Engine(tmp_path / "art")
    np.testing.assert_allclose(engine.logits(IDS.tolist()), kept.logits, rtol=0, atol=tolerance)
    one_by_one = engine.logits(IDS[:1].tolist())
    np.testing.assert_allclose(one_by_one, kept.logits[:1], rtol=0, atol=tolerance)

"""Small random models of ten architectures: compiled logits against transformers' in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llmc
from llmc.artifact import Manifest

VOCAB_SIZE = 128
NUM_TOKENS = 50

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOWS = {
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
ARCHITECTURES = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 16},
    "gemma2": {**SMALL, **WINDOWS, "query_pre_attn_scalar": 16},
    "gemma3_text": {**SMALL, **WINDOWS},
    "phi3": SMALL,
    "gpt2": {
        "vocab_size": VOCAB_SIZE,
        "n_positions": 256,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "olmo2": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**SMALL, **WINDOWS, "num_local_experts": 6, "num_experts_per_tok": 2},
}
# On Vulkan two of them cover every kernel: soft caps and windows; experts and sinks.
QUICK_ON_VULKAN = ("gpt_oss",)
ON_VULKAN = [
    pytest.param(name, "vulkan", marks=[] if name in QUICK_ON_VULKAN else [pytest.mark.slow])
    for name in ARCHITECTURES
]


@pytest.mark.parametrize(
    ("architecture", "target"), [*((name, "cpu") for name in ARCHITECTURES), *ON_VULKAN]
)
def test_compiled_logits_match_transformers_in_every_mode(
    architecture: str, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whole prefill, chunks of odd sizes and token-by-token decode all read the same pages."""
    if target == "vulkan":
        request.getfixturevalue("vulkan")
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialization: scores, gates and routers get away from zero.
            parameter.normal_(0, 0.15 if parameter.dim() > 1 else 0.5)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "artifact"
    llmc.compile(tmp_path / "model", target=target, out=out, max_batch_tokens=32)
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, NUM_TOKENS)
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    engine = llmc.Engine(out)
    for chunk_tokens in (None, 13, 8, 5, 1):
        logits = engine.logits(ids.tolist(), chunk_tokens=chunk_tokens)
        # Sums of a few hundred float32 products in another order; logits are of size 2 to 8.
        np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_experts_in_bytes_come_near_those_in_floats(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mixtral", **ARCHITECTURES["mixtral"])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, NUM_TOKENS).tolist()
    logits = {}
    for scheme in ("w8a16", "w8a8"):
        out = tmp_path / scheme
        llmc.compile(tmp_path / "model", target="cpu", quant=scheme, out=out, max_batch_tokens=32)
        logits[scheme] = llmc.Engine(out).logits(ids, chunk_tokens=13)
    rules = {kernel.rule for kernel in Manifest.load(tmp_path / "w8a8").kernels}
    assert "cpu.integer_experts" in rules
    assert "cpu.experts" not in rules
    difference = logits["w8a8"] - logits["w8a16"]
    # Each of two layers' products rounds its activations to steps of 1/127 of the largest of 32.
    assert np.sqrt((difference**2).mean()) < 0.03 * logits["w8a16"].std()

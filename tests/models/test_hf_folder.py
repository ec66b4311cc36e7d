"""Folders written by save_pretrained must come back with every parameter bit-equal."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.errors import ImportModelError, UnsupportedError
from llmc.models.source import open_source
from llmc.models.torch_numpy import to_numpy

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 64,
    "eos_token_id": 3,
    "bos_token_id": 1,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
CASES = {
    "dense, tied": ("llama", {**TINY, "tie_word_embeddings": True}),
    "dense, untied, biases": ("qwen2", {**TINY, "tie_word_embeddings": False}),
    "transposed projections": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}),
    "experts stored apart": ("mixtral", {**TINY, **MOE}),
    "experts stored apart, many": ("qwen3_moe", {**TINY, **MOE, "moe_intermediate_size": 16}),
    "experts stored together": ("gpt_oss", {**TINY, **MOE, "layer_types": ["full_attention"] * 2}),
    "buffers and latent attention": (
        "deepseek_v3",
        {
            **TINY, **MOE, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
        },
    ),
}  # fmt: skip


def tiny_model(model_type: str, fields: dict, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    for parameter in model.parameters():  # norms and biases start as constants
        torch.nn.init.normal_(parameter)
    return model.to(dtype)


def save_tiny(path: Path, **save: object):
    model = tiny_model(*CASES["dense, tied"])
    model.save_pretrained(path, **save)
    return model


def assert_same_tensors(source, model) -> None:
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in source.tensors if name in names] == names
    for name, tensor in source.tensors.items():
        expected = to_numpy(model.state_dict()[name])
        values = tensor.read()
        assert tensor.shape == expected.shape
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values.view(np.uint8), expected.view(np.uint8), name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_every_parameter_comes_back_bit_equal(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model(*CASES[case], dtype)
    model.save_pretrained(tmp_path)

    source = open_source(str(tmp_path))

    assert_same_tensors(source, model)
    stored = {source.tensors[name].stored for name, _ in model.named_parameters()}
    assert stored <= {"f32", "bf16"}
    assert source.config.model_type == model.config.model_type
    assert all(tensor.read_quantized() is None for tensor in source.tensors.values())


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3

    assert_same_tensors(open_source(str(tmp_path)), model)


def test_name_and_token_ids_come_from_all_the_files_that_state_them(tmp_path: Path) -> None:
    folder = tmp_path / "My Model_1B"
    save_tiny(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<end>": 7}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<end>"}, "chat_template": "from config"})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))

    source = open_source(str(folder))

    assert source.name == "my-model-1b"
    assert source.bos_token_id == 1
    assert source.stop_token_ids == [5, 3, 7]
    assert source.generation_config == {"eos_token_id": [5, 3]}
    assert source.tokenizer_json is not None
    assert Tokenizer.from_buffer(source.tokenizer_json).encode("a").ids == [0]
    assert source.chat_template == "from config"

    (folder / "chat_template.jinja").write_text("from file")
    assert open_source(str(folder)).chat_template == "from file"


def test_a_stop_token_the_files_state_replaces_the_one_the_class_assumes(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_source(str(tmp_path)).stop_token_ids == [2]  # of the config class

    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert open_source(str(tmp_path)).stop_token_ids == [9]


def test_a_slow_tokenizer_is_converted(tmp_path: Path) -> None:
    tiny_model(*CASES["transposed projections"]).save_pretrained(tmp_path)
    letters = {letter: i for i, letter in enumerate("abcdefgh")}
    (tmp_path / "vocab.json").write_text(json.dumps({**letters, "ab": 8, "<|endoftext|>": 9}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")

    source = open_source(str(tmp_path))

    assert source.tokenizer_json is not None
    assert Tokenizer.from_buffer(source.tokenizer_json).encode("abc").ids == [8, 2]


def test_a_folder_without_tokenizer_has_none(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    assert open_source(str(tmp_path)).tokenizer_json is None


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def test_an_alias_feeds_a_tied_parameter(tmp_path: Path) -> None:
    model = tiny_model("llama", {**TINY, "tie_word_embeddings": False})
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    raw = file.read_bytes().replace(b"model.embed_tokens.weight", b"other.embed_tokens.weight")
    file.write_bytes(raw)  # only the head is left under its name
    edit_config(tmp_path, tie_word_embeddings=True)

    source = open_source(str(tmp_path))

    assert "lm_head.weight" not in source.tensors
    np.testing.assert_array_equal(
        source.tensors["model.embed_tokens.weight"].read(), to_numpy(model.lm_head.weight)
    )


def test_a_missing_path_is_named() -> None:
    with pytest.raises(ImportModelError, match=r"/no/such/folder.*no such file"):
        open_source("/no/such/folder")


def test_a_failing_download_names_the_id_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ImportModelError, match=r"someone/model.*network is unreachable") as caught:
        open_source("someone/model")
    assert caught.value.hint is not None


def test_a_hub_id_opens_the_downloaded_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert open_source("someone/Tiny-1").name == "tiny-1"


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match=r"no config\.json"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", '"text"'])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ImportModelError, match=r"config\.json: (not JSON|is )"):
        open_source(str(tmp_path))


def test_an_unknown_model_type_is_named_with_the_way_out(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit_config(tmp_path, model_type="never_heard_of")
    with pytest.raises(UnsupportedError, match="never_heard_of") as caught:
        open_source(str(tmp_path))
    assert "transformers" in str(caught.value.hint)


def test_a_model_that_writes_no_text_token_by_token_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UnsupportedError, match="'t5' has no causal language model"):
        open_source(str(tmp_path))


def test_an_infinity_in_the_config_is_read(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit_config(tmp_path, time_limits=[0.0, {"__float__": "Infinity"}])
    assert open_source(str(tmp_path)).config.time_limits == [0.0, float("inf")]


@pytest.mark.parametrize(
    "fields", [{"num_attention_heads": 0}, {"hidden_size": "wide"}, {"vocab_size": -1}]
)
def test_a_config_that_makes_no_model_is_refused(fields: dict, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(ImportModelError):
        open_source(str(tmp_path))


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(UnsupportedError, match="auto_map"):
        open_source(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4"])
def test_a_quantized_checkpoint_is_refused_by_its_method(method: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedError, match=method):
        open_source(str(tmp_path))


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ImportModelError, match="pickle") as caught:
        open_source(str(tmp_path))
    assert "safetensors" in str(caught.value.hint)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ImportModelError, match=r"no \*\.safetensors"):
        open_source(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ImportModelError, match=shard.name):
        open_source(str(tmp_path))


def test_a_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["model.extra.weight"] = next(iter(fields["weight_map"].values()))
    index.write_text(json.dumps(fields))
    with pytest.raises(ImportModelError, match=r"model\.extra\.weight"):
        open_source(str(tmp_path))


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    name = next(iter(fields["weight_map"]))
    fields["weight_map"][name] = "../secret.safetensors"
    index.write_text(json.dumps(fields))
    with pytest.raises(ImportModelError, match="leaves the folder"):
        open_source(str(tmp_path))


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"model.norm.weight", b"model.mist.weight"))
    with pytest.raises(ImportModelError, match=r"model\.norm\.weight"):
        open_source(str(tmp_path))


def test_weights_of_another_shape_than_the_config_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit_config(tmp_path, intermediate_size=56)
    with pytest.raises(ImportModelError, match=r"mlp\..*\[48, 32\].*\[56, 32\]"):
        open_source(str(tmp_path))


def test_a_missing_expert_is_noticed(tmp_path: Path) -> None:
    tiny_model(*CASES["experts stored apart"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"experts.3.w2", b"expertz.3.w2"))
    with pytest.raises(ImportModelError, match="experts"):
        open_source(str(tmp_path))


def test_a_truncated_tokenizer_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    with pytest.raises(ImportModelError, match=r"tokenizer\.json"):
        open_source(str(tmp_path))

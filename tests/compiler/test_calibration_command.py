"""`llmc compile --calibrate`: from a text to an artifact that verifies, and what is refused."""

import json
import string

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.cli.main import invoke

FIELDS = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **FIELDS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15 if parameter.dim() > 1 else 0.5)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(string.ascii_letters)}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def text(tmp_path):
    letters = np.random.default_rng(3).choice(list(string.ascii_letters), 64 * 16)
    path = tmp_path / "text.txt"
    path.write_text("".join(letters))
    return path


def test_a_calibrated_artifact_verifies_and_keeps_nothing_of_the_calibration(
    model, text, tmp_path, capfd
):
    out = tmp_path / "out"
    arguments = ["--quant", "w4a16-g32-asym", "--calibrate", str(text), "--max-batch-tokens", "32"]
    assert invoke(["compile", str(model), *arguments, "-o", str(out), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["notes"] == []
    assert "calibrate" in [phase["name"] for phase in shown["phases"]]
    assert not [path for path in out.iterdir() if path.is_dir()]
    weights = json.loads((out / "llmc.json").read_text())["weights"]
    assert {w["format"] for w in weights if "proj" in w["name"]} == {"w4-g32-asym"}
    # The reference is made of the calibrated codes: kernels that read others would fail.
    assert invoke(["verify", str(out)]) == 0


def test_what_cannot_be_calibrated_is_refused_before_anything_is_compiled(
    model, text, tmp_path, capfd
):
    out = tmp_path / "out"

    def refused(*arguments) -> str:
        assert invoke(["compile", str(model), *map(str, arguments), "-o", str(out)]) == 2
        assert not out.exists()
        return capfd.readouterr().err

    assert "w8a16 rounds nothing to 4 bits" in refused("--quant", "w8a16", "--calibrate", text)
    assert "keep" in refused("--quant", "keep", "--calibrate", text)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 " * 100)
    assert "not UTF-8 at byte 3" in refused("--quant", "w4a16-g32", "--calibrate", latin)
    text.write_text("abc" * 20)
    message = refused("--quant", "w4a16-g32", "--calibrate", text)
    assert "has 60 tokens, fewer than 4 windows of 64" in message

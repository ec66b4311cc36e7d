"""Artifacts compiled from a config alone: complete but for the weights."""

import json
from pathlib import Path

import pytest
from random_models import TINY

import llmc
from llmc.cli.main import invoke
from llmc.errors import ArtifactError, ImportModelError, UsageError
from llmc.runtime.engine import Engine


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    return folder


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "shapes"
    return llmc.compile(source, quant="w8a16", out=out, max_batch_tokens=64, weights=False).path


def test_it_knows_its_memory_and_says_what_it_lacks(artifact: Path) -> None:
    manifest = json.loads((artifact / "llmc.json").read_text())
    assert manifest["memory"]["weights_bytes"] == sum(w["num_bytes"] for w in manifest["weights"])
    assert not list(artifact.glob("*.safetensors"))
    with pytest.raises(ArtifactError, match="compiled without weights") as raised:
        Engine(artifact)
    assert "--random-weights" in str(raised.value.hint)


def test_made_up_weights_measure_it(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt-tokens", "9", "--gen-tokens", "4", "--repeat", "1", "--json"]
    assert invoke(["bench", str(artifact), "--random-weights", *options]) == 0
    result, *_ = json.loads(capsys.readouterr().out)["results"]
    assert result["decode_tokens_per_s"]["median"] > 0


def test_without_the_option_weights_are_wanted(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match=r"no \*\.safetensors"):
        llmc.compile(source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_calibrated_without_weights(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("words")
    with pytest.raises(UsageError, match="without weights"):
        llmc.compile(source, quant="w4a16-g32", calibrate=text, weights=False)

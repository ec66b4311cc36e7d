"""Opening an artifact folder: checked first, and without the compile side."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from fake_model import FakeExecutor, make_manifest
from text_models import byte_level_tokenizer

import llmc
from llmc.artifact import CHAT_TEMPLATE_FILE, TOKENIZER_FILE, sha256_of
from llmc.errors import ArtifactError, CapacityError, UsageError
from llmc.runtime.engine import Engine
from llmc.runtime.sampling_params import SamplingParams

ROOT = Path(llmc.__file__).resolve().parents[1]
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        blocked = ("torch", "transformers", "accelerate", "gguf", "onnx",
                   "llmc.compiler", "llmc.models", "llmc.targets")
        if name in blocked or name.startswith(tuple(b + "." for b in blocked)):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
"""


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def write_artifact(folder: Path, files: dict[str, str], **changes: object) -> Path:
    for name, content in files.items():
        (folder / name).write_text(content)
    manifest = dataclasses.replace(
        make_manifest(), files={name: sha256_of(folder / name) for name in files}, **changes
    )
    (folder / "llmc.json").write_text(manifest.to_json())
    return folder


def test_the_engine_imports_neither_torch_nor_the_compile_side():
    out = run_python(
        BLOCKED + "from llmc import Engine, SamplingParams, RequestOutput, LlmcError\n"
        "print(Engine.__name__, SamplingParams(n=2).n)"
    )
    assert out == "Engine 2\n"


def test_importing_llmc_loads_no_heavy_module():
    out = run_python(
        "import sys, llmc\n"
        "print([m for m in ('numpy', 'tvm', 'torch', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    assert out == "[]\n"


def test_the_version_is_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert llmc.__version__ == project["version"]


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nothing"):
        llmc.nothing  # noqa: B018
    assert "compile" in dir(llmc)


def test_damage_is_found_before_anything_else(tmp_path):
    folder = write_artifact(tmp_path, {TOKENIZER_FILE: "{}"})
    (folder / TOKENIZER_FILE).write_text("{ }")
    with pytest.raises(ArtifactError, match="SHA-256"):
        Engine(folder)


def test_a_missing_folder_and_bad_parts_are_artifact_errors(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder"):
        Engine(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        Engine(write_artifact(tmp_path, {TOKENIZER_FILE: "{}"}))
    (tmp_path / "b").mkdir()
    with pytest.raises(ArtifactError, match="chat template is not valid"):
        Engine(write_artifact(tmp_path / "b", {CHAT_TEMPLATE_FILE: "{% if %}"}))


def test_what_cannot_fit_is_refused_before_the_model_is_loaded(tmp_path):
    memory = dataclasses.replace(make_manifest().memory, weights_bytes=2**50)
    with pytest.raises(CapacityError, match="weights 1048576"):
        Engine(write_artifact(tmp_path, {}, memory=memory))
    with pytest.raises(UsageError, match="max_sequences is 9, expected 1 to 8"):
        Engine(write_artifact(tmp_path, {}), max_sequences=9)


def test_an_artifact_opens_with_its_pages_tokenizer_and_template(tmp_path, monkeypatch):
    opened = {}

    def load_executor(directory, manifest, *, num_pages, place, weights):
        opened.update(directory=directory, num_pages=num_pages, device=place.kind)
        return FakeExecutor(manifest, num_pages)

    stand_in = types.ModuleType("llmc.runtime.executor")
    stand_in.load_executor = load_executor
    monkeypatch.setitem(sys.modules, "llmc.runtime.executor", stand_in)
    tokenizer = byte_level_tokenizer()
    start, end = tokenizer.token_id("<s>"), tokenizer.token_id("</s>")
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    info = dataclasses.replace(
        make_manifest().model,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=start,
        stop_token_ids=[end],
    )
    files = {TOKENIZER_FILE: tokenizer._tokenizer.to_str(), CHAT_TEMPLATE_FILE: template}
    folder = write_artifact(tmp_path, files, model=info)
    engine = Engine(folder, device="cpu", kv_cache_tokens=100, max_sequences=2)
    assert opened == {"directory": folder, "num_pages": [25], "device": "cpu"}
    ids = engine.chat_prompt([{"role": "user", "content": "hello"}])
    assert ids == [start, *tokenizer.encode("hello"), end]
    output = engine.generate("hello", SamplingParams(temperature=0, max_tokens=5))[0]
    assert output.prompt_token_ids == tokenizer.encode("hello")
    assert tokenizer.decode(output.token_ids) == output.text

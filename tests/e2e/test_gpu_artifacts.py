"""Artifacts for GPUs that this machine does not have: what their manifests say, and whether it is
what their libraries hold.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from random_models import TINY

import llmc
from llmc.artifact import Manifest
from llmc.targets.registry import list_targets

MODELS = {
    "llama": TINY,
    "mixtral": {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@dataclass(frozen=True, kw_only=True)
class Expected:
    spec: str
    library: str
    features: list[str]
    rules: set[str]  # the target's own
    experts: str  # rule of many tokens' experts


EXPECTED = {
    "cuda": Expected(
        spec="cuda:sm_80,sm_90",
        library="model.so",
        features=["sm_80"],
        rules={"cuda.gemv", "cuda.tensor_cores", "cuda.attention"},
        experts="gpu.experts",
    ),
    "rocm": Expected(
        spec="rocm:gfx90a,gfx942",
        library="model.so",
        features=["gfx90a or gfx942"],
        rules={"rocm.matrix"},
        experts="rocm.matrix_experts",
    ),
    "metal": Expected(
        spec="metal",
        library="model.dylib",
        features=["apple7", "arm64", "macos13"],
        rules={"metal.simdgroup"},
        experts="metal.simdgroup_experts",
    ),
}


# One that builds in seconds; the others take longer.
PAIRS = [
    pytest.param((model, target), id=f"{model}-{target}", marks=marks)
    for model in MODELS
    for target in EXPECTED
    for marks in [() if (model, target) == ("llama", "metal") else pytest.mark.slow]
]


@pytest.fixture(scope="module", params=PAIRS)
def built(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """(model, target, artifact), compiled from a config."""
    model, name = request.param
    [status] = [s for s in list_targets() if s.name == name]
    if not status.can_build:
        pytest.skip(f"{'; '.join(status.reasons)}: {status.hint}")
    folder = tmp_path_factory.mktemp(f"{model}-{name}")
    (folder / "config.json").write_text(json.dumps({"model_type": model, **MODELS[model]}))
    out = folder / "artifact"
    options = {"quant": "w4a16-g32", "max_batch_tokens": 64, "weights": False}
    return model, name, llmc.compile(folder, target=EXPECTED[name].spec, out=out, **options).path


def test_the_variant_says_what_was_asked_for_and_what_a_device_needs(built) -> None:
    _, name, path = built
    [variant] = Manifest.load(path).variants
    expected = EXPECTED[name]
    assert (variant.device_kind, variant.target) == (name, expected.spec)
    assert (variant.library, variant.features) == (expected.library, expected.features)
    assert (path / variant.library).is_file()


def test_the_memory_plan_is_that_of_what_the_manifest_lists(built) -> None:
    _, _, path = built
    manifest = Manifest.load(path)
    memory = manifest.memory
    assert {w.layout for w in manifest.weights} == {"chunk32", "plain"}
    assert memory.weights_bytes == sum(w.num_bytes for w in manifest.weights)
    assert manifest.sampling is not None
    parts = [entry.workspace_bytes for entry in manifest.entry_points]
    parts.append(manifest.sampling.workspace_bytes)
    assert max(parts) <= memory.workspace_bytes < sum(parts)  # they lie in the same memory
    rows = max(entry.max_logits_rows for entry in manifest.entry_points)
    assert memory.logits_bytes == rows * TINY["vocab_size"] * 4
    head_dim = TINY["hidden_size"] // TINY["num_attention_heads"]
    layer = 2 * TINY["num_key_value_heads"] * head_dim * 2  # keys and values in float16
    assert memory.kv_bytes_per_token == TINY["num_hidden_layers"] * layer
    # Activations of a step at its bounds: the widest of them at least.
    step = {entry.name: entry for entry in manifest.entry_points}["step"]
    assert step.workspace_bytes >= 64 * 2 * TINY["intermediate_size"] * 4
    assert step.workspace_bytes > step_of_one(manifest)


def step_of_one(manifest: Manifest) -> int:
    [one] = [entry.workspace_bytes for entry in manifest.entry_points if entry.max_tokens == 1]
    return one


def test_inspect_lists_every_kernel_of_the_library_with_its_rule(built, run_llmc) -> None:
    model, name, path = built
    code, out, _ = run_llmc("inspect", path, "--json")
    assert code == 0
    kernels = {kernel["name"]: kernel["rule"] for kernel in json.loads(out)["kernels"]}
    library = (path / EXPECTED[name].library).read_bytes()
    names = re.findall(rb"(?<!\w)(\w+?)_kernel(?:_\d+)?(?!\w)", library)
    # The byte before a name, its length, may look like a letter.
    found = {n[1:] if n[1:] in kernels else n for n in (name.decode() for name in names)}
    assert found == set(kernels)
    rules = set(kernels.values())
    assert rules >= {"gpu.norm", "gpu.sampling", *EXPECTED[name].rules}
    assert all(re.fullmatch(rf"(gpu|dlight|{name})\.\w+", rule) for rule in rules)
    if model == "mixtral":
        assert rules >= {EXPECTED[name].experts, "gpu.few_experts"}
    code, out, _ = run_llmc("inspect", path)
    for kernel, rule in kernels.items():
        assert re.search(rf"\b{kernel} +{re.escape(rule)} ", out), (kernel, rule)

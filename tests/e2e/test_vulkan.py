"""The tiny model on this machine's Vulkan device: right answers, and clear words without them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi
from greedy import assert_same, greedy

import llmc
from llmc.artifact import Manifest
from llmc.errors import ArtifactError, CapacityError, UsageError
from llmc.runtime import tvm_runtime
from llmc.runtime.device_inputs import DeviceInputs
from llmc.runtime.devices import choose_place
from llmc.runtime.devices.device import Array
from llmc.runtime.devices.vulkan import Vulkan
from llmc.runtime.engine import Engine
from llmc.runtime.executor import load_executor
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.verify import verify
from llmc.runtime.weights import random_tensors

pytestmark = pytest.mark.usefixtures("vulkan")
VALIDATION = "VK_LAYER_KHRONOS_validation"
ANSWER = """
import sys
from llmc import Engine, SamplingParams
engine = Engine(sys.argv[1])
for sampling in ({"temperature": 0}, {"seed": 1, "top_k": 50, "top_p": 0.9}):
    params = SamplingParams(max_tokens=4, ignore_eos=True, **sampling)
    print(engine.generate([[1, 2, 3]], params)[0].token_ids)
"""


def answer(artifact: Path, **variables: str) -> str:
    """Greedy tokens from a process of its own with these environment variables; all it printed."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(artifact)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    return done.stdout + done.stderr


def test_every_entry_point_computes_the_references_numbers(on_vulkan: Path) -> None:
    report = verify(on_vulkan)
    assert report.passed
    # As exact as the CPU's float32, far within what the artifact allows.
    assert report.total.max_abs < 1e-4


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 16}, {"kv_cache_tokens": 160}],
    ids=["batch", "chunks", "preemption"],
)
def test_answers_are_the_cpus(
    on_vulkan: Path, tiny_artifact: Path, options: dict[str, int]
) -> None:
    random = np.random.default_rng(1)
    prompts = [random.integers(0, 256, n).tolist() for n in (1, 2, 7, 16, 17, 31, 60)]
    expected = greedy(Engine(tiny_artifact), prompts, max_tokens=16)
    engine = Engine(on_vulkan, **options)
    assert_same(greedy(engine, prompts, max_tokens=16), expected, least_certain=0.8)
    assert engine.stats.kv_cache_usage_ratio == 0


def test_tokens_are_chosen_on_the_device_and_no_logits_copied(
    on_vulkan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    copy_rows = tvm_runtime.copy_rows_from
    monkeypatch.setattr(
        tvm_runtime, "copy_rows_from", lambda t, r: (rows.append(len(r)), copy_rows(t, r))[1]
    )
    engine = Engine(on_vulkan)
    prompts = [[1, 2, 3], [200, 7], list(range(40))]
    plain = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    chosen = [output.token_ids for output in engine.generate(prompts, plain)]
    assert len(rows) >= 12
    assert not any(rows)
    # Log-probabilities need all logits: the host chooses.
    read = [SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=0)] * 3
    assert chosen == [output.token_ids for output in engine.generate(prompts, read)]
    rows.clear()
    mixed = engine.generate(prompts, [plain, read[0], plain])
    assert [output.token_ids for output in mixed] == chosen
    assert max(rows) == 1


def test_a_seed_gives_the_same_tokens_in_any_batch(on_vulkan: Path) -> None:
    engine = Engine(on_vulkan)
    params = [
        SamplingParams(max_tokens=10, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=10, seed=2, top_k=20, top_p=0.9, ignore_eos=True),
        SamplingParams(max_tokens=10, seed=3, min_p=0.1, temperature=0.7, ignore_eos=True),
        SamplingParams(max_tokens=10, seed=4, frequency_penalty=0.5, ignore_eos=True),
    ]
    prompts = [[1], [2, 3], [4, 5, 6], [7]]
    alone = [engine.generate(p, q)[0].token_ids for p, q in zip(prompts, params, strict=True)]
    together = [output.token_ids for output in engine.generate(prompts, params)]
    assert together == alone


class Recordings:
    """Graphs that record nothing, and note under which keys calls came; their transfers are waited
    for, and no step begins ahead.
    """

    def __init__(self) -> None:
        self.keys: list[tuple[object, ...]] = []
        self.transfers = self
        self._inputs = DeviceInputs(tvm_runtime.tvm_ffi().device("vulkan", 0))

    @property
    def generation(self) -> int:
        return self._inputs.generation

    def to_device(self, arrays: Sequence[Array]) -> list[object]:
        return self._inputs.copy(arrays)

    def to_host(self, tensor: object) -> Callable[[], object]:
        return partial(tvm_runtime.copy_from, tensor)

    def run(self, key: tuple[object, ...], call: Callable[[], object]) -> object:
        self.keys.append(key)
        return call()


def test_decodes_are_recorded_together_with_the_choice_of_tokens(
    on_vulkan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine(on_vulkan)
    recordings = Recordings()
    monkeypatch.setattr(Vulkan, "graphs", lambda self, index: recordings)
    engine = Engine(on_vulkan)
    monkeypatch.setattr(engine._executor, "begin", None)
    functions = {
        "choose_largest": {"temperature": 0},
        "choose_drawn": {"seed": 1},
        "choose_limited": {"seed": 1, "top_k": 9},
        None: {"seed": 1, "logprobs": 0},
    }
    for function, sampling in functions.items():
        params = SamplingParams(max_tokens=6, ignore_eos=True, **sampling)
        [expected] = plain.generate([3, 4, 5], params)
        recordings.keys.clear()
        [found] = engine.generate([3, 4, 5], params)
        assert found.token_ids == expected.token_ids
        assert [key[0] for key in recordings.keys] == [function] * 5  # all but the prompt's step


def test_inspect_lists_what_chooses_tokens(on_vulkan: Path, run_llmc) -> None:
    code, out, _ = run_llmc("inspect", on_vulkan)
    assert code == 0
    assert re.search(r"sampling +on the device", out)
    assert re.search(r"argmax_parts +gpu.sampling", out)


def test_copies_through_staging_buffers_change_nothing(on_vulkan: Path) -> None:
    direct = answer(on_vulkan)
    assert re.fullmatch(r"(\[\d+, \d+, \d+, \d+\]\n){2}", direct)
    assert answer(on_vulkan, LLMC_VULKAN_STAGING="1") == direct


@pytest.mark.parametrize("staging", ["0", "1"])
def test_the_validation_layers_have_nothing_to_say(on_vulkan: Path, staging: str) -> None:
    layer = {"VK_INSTANCE_LAYERS": VALIDATION, "LLMC_VULKAN_STAGING": staging}
    loaded = answer(on_vulkan, VK_LOADER_DEBUG="layer", **layer)
    if f'Insert instance layer "{VALIDATION}"' not in loaded:
        pytest.skip("needs the validation layers; apt-get install vulkan-validationlayers")
    synchronization = "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT"
    assert answer(on_vulkan, VK_LAYER_ENABLES=synchronization, **layer) == answer(on_vulkan)


def test_a_machine_without_a_driver_says_what_to_install(on_vulkan: Path) -> None:
    said = answer(on_vulkan, VK_ICD_FILENAMES="/none", VK_DRIVER_FILES="/none")
    assert "ArtifactError: no Vulkan device: no Vulkan 1.2 driver is installed" in said
    assert "hint: install the driver of your GPU" in said


def test_a_wrong_index_names_the_devices_there_are(
    on_vulkan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="there is no device vulkan:99\nhint: there are 0: "):
        Engine(on_vulkan, device="vulkan:99")
    with pytest.raises(UsageError, match="'x' is no number"):
        Engine(on_vulkan, device="vulkan:x")
    monkeypatch.setenv("LLMC_VULKAN_DEVICE", "98")
    with pytest.raises(UsageError, match="there is no device vulkan:98"):
        Engine(on_vulkan)
    monkeypatch.setenv("LLMC_VULKAN_DEVICE", "first")
    with pytest.raises(UsageError, match="LLMC_VULKAN_DEVICE is 'first', not the number"):
        Engine(on_vulkan)


def test_a_feature_that_the_device_lacks_is_named(on_vulkan: Path) -> None:
    manifest = Manifest.load(on_vulkan)
    assert {"bufferDeviceAddress", "threads128"} <= set(manifest.variants[0].features)
    foreign = replace(manifest.variants[0], features=["bufferDeviceAddress", "shaderFloat999"])
    with pytest.raises(ArtifactError, match=r"lacks what .* needs shaderFloat999"):
        choose_place(replace(manifest, variants=[foreign]), "vulkan")


def test_artifacts_of_another_target_are_refused(on_vulkan: Path, tiny_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="built for cpu, not for vulkan"):
        Engine(tiny_artifact, device="vulkan")
    with pytest.raises(ArtifactError, match="built for vulkan, not for cpu"):
        Engine(on_vulkan, device="cpu")


def test_memory_that_the_device_does_not_have_is_refused_with_the_sum(
    on_vulkan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llmc.runtime.devices.vulkan.Vulkan.available_bytes", lambda self, index: 300_000
    )
    with pytest.raises(CapacityError, match=r"= weights 0\.00 GiB \+ workspace"):
        Engine(on_vulkan)


def test_memory_that_the_device_promised_and_does_not_give_is_an_error_too(on_vulkan: Path) -> None:
    manifest = Manifest.load(on_vulkan)
    place = choose_place(manifest, "vulkan")
    pages = [2**48 // cache.page_bytes for cache in manifest.caches[:1]]
    with pytest.raises(CapacityError, match=r"VK_ERROR_OUT_OF_DEVICE_MEMORY: \d+ bytes asked of"):
        load_executor(
            on_vulkan,
            manifest,
            num_pages=pages,
            place=place,
            weights=partial(random_tensors, manifest),
        )
    assert verify(on_vulkan).passed  # the device is as good as before


def test_a_lost_device_ends_the_request_with_vulkans_name_for_it(on_vulkan: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST, str(on_vulkan)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "error []\n"
    assert "LlmcError: Vulkan: VK_ERROR_DEVICE_LOST" in done.stderr
    assert done.returncode == 0  # the process goes on, and ends cleanly


LOST = """
import sys, tvm_ffi
from llmc import Engine, SamplingParams
engine = Engine(sys.argv[1])
tvm_ffi.get_global_func("llmc.vulkan.simulate_device_lost")(0)
[output] = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
print(output.finish_reason, output.token_ids)
"""


@pytest.mark.parametrize("target", ["vulkan:subgroup8", "vulkan:subgroup32"])
def test_levels_state_the_subgroup_they_were_made_for(
    target: str, tiny_model: Path, tmp_path: Path
) -> None:
    built = llmc.compile(tiny_model, target=target, out=tmp_path / "a", max_batch_tokens=16)
    size = target.removeprefix("vulkan:subgroup")
    assert f"subgroupSize{size}" in built.manifest.variants[0].features
    present = tvm_ffi.get_global_func("llmc.vulkan.features")(0)
    if f"subgroupSize{size}" in list(present):
        assert verify(built.path).passed
    else:
        with pytest.raises(ArtifactError, match=f"needs subgroupSize{size}"):
            Engine(built.path)


def test_an_artifact_for_several_levels_runs_the_first_that_the_device_has(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_llmc
) -> None:
    code, _, said = run_llmc(
        *("compile", tiny_model, "--target", "vulkan:matrix,portable", "--quant", "f16"),
        *("-o", tmp_path / "a", "--max-batch-tokens", 64),
    )
    assert code == 0
    levels = ["vulkan:matrix", "vulkan:portable"]
    phases = [f"{phase}, {level}" for level in levels for phase in ("passes", "codegen", "link")]
    assert [line[:28].rstrip() for line in said.splitlines() if "vulkan:" in line] == phases
    manifest = Manifest.load(tmp_path / "a")
    assert [variant.target for variant in manifest.variants] == levels
    assert [variant.library for variant in manifest.variants] == ["model.so", "model-portable.so"]
    matrices = {"cooperativeMatrix16x16x16", "subgroupSize32"}
    present = Vulkan().features(0)
    expected = "model.so" if matrices <= present else "model-portable.so"
    assert choose_place(manifest, "vulkan").variant.library == expected
    report = verify(tmp_path / "a")
    assert report.passed, report.reason
    # Of one that multiplies matrices, the first.
    with monkeypatch.context() as patch:
        patch.setattr(Vulkan, "features", lambda self, index: present | matrices)
        assert choose_place(manifest, "vulkan").variant.library == "model.so"
    code, out, _ = run_llmc("inspect", tmp_path / "a")
    assert "vulkan.matrix" in out
    assert "cooperativeMatrix16x16x16" in out


def test_unknown_levels_are_refused(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="unknown Vulkan level 'warp'\nhint: one or more of"):
        llmc.compile(tiny_model, target="vulkan:warp")

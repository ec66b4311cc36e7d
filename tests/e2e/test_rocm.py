"""A whole model for AMD's GPUs: its host's side runs on a HIP runtime whose kernels do nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmc
from llmc.artifact import Manifest
from llmc.targets.registry import list_targets

pytestmark = pytest.mark.slow
FAKE = Path(__file__).parents[1] / "targets" / "rocm" / "fake_hip.c"
ANSWER = """
import sys
from llmc import Engine, SamplingParams
engine = Engine(sys.argv[1])
prompts = [[1, 2, 3], [5] * 40]
for _ in range(3):
    found = engine.generate(prompts, SamplingParams(max_tokens=4, temperature=0))
print([len(answer.token_ids) for answer in found], engine.stats.kv_cache_usage_ratio)
"""


@pytest.fixture(scope="module")
def on_rocm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in 4 bits; not to be written to."""
    [status] = [s for s in list_targets() if s.name == "rocm"]
    if not status.can_build:
        pytest.skip(f"{'; '.join(status.reasons)}: {status.hint}")
    out = tmp_path_factory.mktemp("rocm") / "tiny"
    return llmc.compile(
        tiny_model, target="rocm", quant="w4a16-g32", out=out, max_batch_tokens=64
    ).path


def test_the_artifact_says_what_it_needs_and_which_rule_made_what(on_rocm: Path) -> None:
    [variant] = Manifest.load(on_rocm).variants
    assert (variant.device_kind, variant.features) == ("rocm", ["gfx942"])
    rules = set(re.findall(r'"rule": ?"([^"]+)"', (on_rocm / "llmc.json").read_text()))
    assert {"rocm.matrix", "gpu.gemv", "gpu.few", "gpu.attention", "gpu.norm"} <= rules


def test_batches_launch_every_kind_of_kernel_and_allocate_nothing_anew(
    on_rocm: Path, tmp_path: Path
) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library, log = tmp_path / "libamdhip64.so.6", tmp_path / "log"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, FAKE], check=True)
    log.write_text("")
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(on_rocm)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "FAKE_HIP_LOG": str(log)},
    )
    assert done.stdout == "[4, 4] 0.0\n", done.stderr
    calls = log.read_text().splitlines()
    launched = {m[1] for line in calls if (m := re.match(r"launch ([a-z_]+)_\d", line))}
    assert {"matrix", "few", "attention", "norm", "embedding", "rope"} <= launched
    starts = [n for n, line in enumerate(calls) if line.startswith("launch embedding")]
    assert len(starts) % 3 == 0, "the rounds are equal"
    _, second, third = starts[:: len(starts) // 3]
    taken = [int(line.split()[1]) for line in calls[starts[0] :] if line.startswith("malloc")]
    planned = Manifest.load(on_rocm).memory
    assert 0 < sum(taken) <= planned.workspace_bytes + planned.logits_bytes
    # The second round's prompt is the first to find a step's chosen tokens held: the VM lets go of
    # its last result with the next. That is one page; weights, pages and workspaces are there.
    assert [line for line in calls[second:third] if line.startswith("malloc")] == [
        "malloc 4096 on 0"
    ]
    assert not [line for line in calls[third:] if line.startswith("malloc")]


def test_a_machine_without_a_driver_says_what_to_install(on_rocm: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(on_rocm)], capture_output=True, text=True, check=False
    )
    assert "ArtifactError: no ROCm device: " in done.stderr
    assert "hint: install AMD's driver" in done.stderr

"""What a process that serves takes is what the manifest says: measured, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import TINY, save_random_model

import llmc
from llmc.artifact import Manifest

ROOT = Path(__file__).parents[2]
THREADS = 2
MIB = 2**20
# Pages of libraries that are touched only now, Python's objects, what the allocator does not reuse.
TOLERANCE = 8 * MIB
# The demo's tokenizer is no part of the plan: its tables, and what lies between its tokens.
TOKENIZER = 8 * MIB

# A long prompt, then as many sequences as possible, of which fewer and fewer are left: steps with
# every number of tokens and of logits rows.
SERVE = """
import json, sys
from pathlib import Path
from llmc import Engine, SamplingParams
from llmc.runtime import executor, tvm_runtime
import tokenizers, jinja2
tvm_runtime.tvm_ffi()

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

before = resident("VmRSS")
engine = Engine(sys.argv[1], kv_cache_tokens=int(sys.argv[2]))
manifest = engine.manifest
prompt = [1] * (2 * manifest.max_batch_tokens)
engine.generate([prompt], SamplingParams(max_tokens=2, temperature=0))
for index in range(manifest.max_sequences):
    params = SamplingParams(max_tokens=2 + 2 * index, temperature=0, ignore_eos=True)
    engine.submit(str(index), [1, 2, 3], params)
while engine.has_work():
    engine.step()
kv = sum(p * c.page_bytes for c in manifest.caches for p in [engine._executor.caches[0].shape[0]])
print(json.dumps({"taken": resident("VmHWM") - before, "kv": kv}))
"""


def served(artifact: Path, kv_cache_tokens: int) -> dict[str, int]:
    """Bytes that a process takes to load the artifact and to serve, and those of its KV pages."""
    result = subprocess.run(
        [sys.executable, "-c", SERVE, artifact, str(kv_cache_tokens)],
        cwd=ROOT,
        env={"PATH": "", "LLMC_NUM_THREADS": str(THREADS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def planned(artifact: Path) -> int:
    """Bytes that the artifact needs, without KV pages."""
    memory = Manifest.load(artifact).memory
    workspace = memory.workspace_bytes + THREADS * memory.thread_bytes
    return memory.weights_bytes + workspace + memory.logits_bytes


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose steps take far more memory than its weights, kept in 8 bits."""
    fields = {
        **TINY,
        "vocab_size": 16384,
        "intermediate_size": 16384,
        "max_position_embeddings": 2048,
    }
    folder = tmp_path_factory.mktemp("wide")
    source = save_random_model("llama", fields, folder / "source")
    return llmc.compile(source, quant="w8a16", out=folder / "artifact").path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_takes_no_more_than_planned(wide: Path) -> None:
    found = served(wide, 4096)
    workspace = Manifest.load(wide).memory.workspace_bytes
    assert workspace > 3 * TOLERANCE
    assert found["taken"] <= planned(wide) + found["kv"] + TOLERANCE
    # And the plan is no guess on the safe side: a step at its bounds writes to nearly all of it.
    assert found["taken"] >= planned(wide) - Manifest.load(wide).memory.logits_bytes - TOLERANCE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_demo_takes_no_more_than_planned(demo_keep: Path) -> None:
    found = served(demo_keep, 2048)
    assert found["taken"] <= planned(demo_keep) + found["kv"] + TOKENIZER + TOLERANCE

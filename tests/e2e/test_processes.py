"""Fresh processes: what they import, how soon they answer, what a compile takes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from random_models import DEMO

ROOT = Path(__file__).parents[2]
FORBIDDEN = ["torch", "transformers", "accelerate", "gguf", "onnx", "safetensors"]
COMPILE_SIDE = ["llmc.compiler", "llmc.models", "llmc.targets"]

FIRST_TOKEN = """
import sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None  # Python's way to say: cannot be imported
from llmc import Engine, SamplingParams
[output] = Engine(sys.argv[1]).generate("Water is", SamplingParams(max_tokens=1, temperature=0.0))
print(output.token_ids, repr(output.text))
"""


def first_token(artifact: Path, blocked: list[str]) -> str:
    """Loads the artifact in a new process and generates one token; what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", FIRST_TOKEN, artifact, ",".join(blocked)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_engine_needs_neither_torch_nor_the_compile_side(demo_keep: Path) -> None:
    with_all = first_token(demo_keep, ["there.is.no.such.module"])
    assert first_token(demo_keep, [*FORBIDDEN, *COMPILE_SIDE]) == with_all


def test_the_first_token_comes_soon_after_the_process_starts(
    demo_keep: Path, record_testsuite_property
) -> None:
    """Python's start and imports included; 2 s is the promise, 4 s leaves room for busy cores."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        first_token(demo_keep, FORBIDDEN)
        seconds.append(time.perf_counter() - start)
    record_testsuite_property("seconds_to_first_token", statistics.median(seconds))
    assert statistics.median(seconds) < 4


COMPILE = """
import sys
from llmc.cli.benchmark import peak_memory_mib
from llmc.cli.main import invoke
code = invoke(sys.argv[1:])
print(peak_memory_mib())
sys.exit(code)
"""


@pytest.mark.slow
def test_a_compile_stays_within_its_time_and_memory(
    tmp_path: Path, record_testsuite_property
) -> None:
    options = ["compile", DEMO, "--quant", "keep", "-o", tmp_path / "art"]
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    seconds = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    folder, peak_mib = result.stdout.splitlines()
    assert folder == str(tmp_path / "art")
    record_testsuite_property("compile_seconds", seconds)
    record_testsuite_property("compile_peak_mib", float(peak_mib))
    assert seconds < 120
    assert float(peak_mib) < 4096

"""Fresh processes: what they import, how soon they answer, what a compile takes."""

from __future__ import annotations

import json
import os
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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs the child's own peak memory")
def test_a_compile_stays_within_its_time_and_memory(
    tmp_path: Path, record_testsuite_property
) -> None:
    command = [sys.executable, "-m", "llmc.cli.main", "compile", DEMO, "--quant", "keep", "--json"]
    start = time.perf_counter()
    with (tmp_path / "report.json").open("w") as report:
        process = subprocess.Popen([*command, "-o", tmp_path / "art"], cwd=ROOT, stdout=report)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    peak_gib = usage.ru_maxrss / (1 << 30 if sys.platform == "darwin" else 1 << 20)
    assert process.returncode == 0
    assert json.loads((tmp_path / "report.json").read_text())["path"] == str(tmp_path / "art")
    record_testsuite_property("compile_seconds", seconds)
    record_testsuite_property("compile_peak_gib", peak_gib)
    assert seconds < 120
    assert peak_gib < 4

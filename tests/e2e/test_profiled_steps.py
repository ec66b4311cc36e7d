"""`llmc bench --profile` on a compiled artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmc.cli import bandwidth, peaks


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_TOTAL_BYTES", 8 << 20)
    monkeypatch.setattr(peaks, "_TURNS", 1 << 14)


def test_every_kernel_of_a_step_is_timed_and_has_a_floor(tiny_artifact: Path, run_llmc) -> None:
    code, out, err = run_llmc(
        *("bench", tiny_artifact, "--profile", "--prompt-tokens", 40, "--gen-tokens", 8),
        *("--batch", "1,3", "--repeat", 2, "--json"),
    )
    assert code == 0, err
    report = json.loads(out)
    prefill, one, three = report["steps"]
    assert (prefill["num_tokens"], prefill["num_sequences"]) == (40, 1)
    assert (one["entry_point"], one["num_tokens"], one["num_steps"]) == ("step_1", 1, 2 * 7)
    assert three["num_tokens"] == three["num_sequences"] == 3
    for step in report["steps"]:
        by_rule: dict[str, float] = {}
        for kernel in step["kernels"]:
            assert kernel["us_per_call"] > 0
            assert kernel["floor_us"] > 0
            by_rule.setdefault(kernel["rule"], 0)
            by_rule[kernel["rule"]] += kernel["calls_per_step"]
        assert by_rule["cpu.attention"] == 2  # layers
        assert by_rule["cpu.embedding"] == 1
        times = [kernel["ms_per_step"] for kernel in step["kernels"]]
        assert times == sorted(times, reverse=True)
        assert step["kernels_ms"] == pytest.approx(sum(times))
    # The decode step's products read each matrix of the model once: 4 of attention and 3 of the
    # feed-forward layer (64 × 64, twice 64 × 32, 64 × 96 thrice) in 2 layers, and the head.
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 256 * 64
    operations = sum(
        k["operations"] * k["calls_per_step"]
        for k in one["kernels"]
        if "attention" not in k["name"]
    )
    assert operations == 2 * matrices
    limits = report["limits"]
    assert limits["memory_bytes_per_s"] > 1e8
    assert limits["operations_per_s"]["f32"] > 1e8


def test_the_profile_is_a_table_for_each_kind_of_step(tiny_artifact: Path, run_llmc) -> None:
    code, out, err = run_llmc(
        *("bench", tiny_artifact, "--profile", "--prompt-tokens", 16, "--gen-tokens", 8),
        *("--batch", "1", "--repeat", 1),
    )
    assert code == 0, err
    assert "step_1, 1 tokens of 1 sequences" in out
    assert "µs a call" in out
    assert "memory reads" in err

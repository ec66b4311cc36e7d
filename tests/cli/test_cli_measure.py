"""`llmc bench`, `eval`, `verify`, `inspect` and `targets`."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from toy_artifact import (
    byte_level_tokenizer,
    install_fake_executor,
    reference_logits,
    toy_manifest,
    toy_reference,
    write_artifact,
)

from llmc.artifact import KernelInfo, MemoryPlan, WeightTensor
from llmc.cli import bandwidth
from llmc.cli.benchmark import Measurement, bandwidth_share, measure
from llmc.cli.perplexity import perplexity
from llmc.reference import Reference
from llmc.runtime.engine import Engine


@pytest.fixture(autouse=True)
def _small_bandwidth_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_TOTAL_BYTES", 8 << 20)


def test_bench_reports_each_batch_with_its_spread(llmc, artifact: Path) -> None:
    code, out, err = llmc(
        *("bench", artifact, "--prompt-tokens", 20, "--gen-tokens", 8),
        *("--batch", "1,4", "--repeat", 3, "--json"),
    )
    assert code == 0, err
    report = json.loads(out)
    assert [result["batch"] for result in report["results"]] == [1, 4]
    for result in report["results"]:
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "inter_token_ms"):
            figure = result[name]
            assert figure["n"] == 3
            assert 0 < figure["min"] <= figure["median"] <= figure["max"]
        assert result["peak_memory_mib"] > 10
        assert result["memory_bandwidth_share"]["median"] > 0
    for name in ("command", "llmc_version", "tvm_version", "device", "warm_up"):
        assert name in report
    assert report["read_bandwidth_bytes_per_s"] > 1e8
    assert "np.max" in report["read_bandwidth_method"]


def test_bench_prints_a_table_on_stdout_and_the_setting_on_stderr(llmc, artifact: Path) -> None:
    code, out, err = llmc(
        *("bench", artifact, "--prompt-tokens", 4, "--gen-tokens", 4, "--batch", 2, "--repeat", 1)
    )
    assert code == 0
    assert "decode tokens/s" in out
    assert "n = 1" in err
    assert err.startswith("$ llmc bench ")


@pytest.mark.parametrize(
    "options",
    [
        ["--batch", "1,x"],
        ["--batch", "0"],
        ["--batch", "9"],  # the artifact takes 8 sequences
        ["--prompt-tokens", "500", "--gen-tokens", "20", "--batch", "1"],  # context 512
    ],
)
def test_bench_refuses_what_the_artifact_cannot_take(llmc, artifact: Path, options) -> None:
    code, out, _ = llmc("bench", artifact, *options)
    assert (code, out) == (2, "")


def test_peak_memory_is_this_process_s_and_not_its_parent_s() -> None:
    held = np.ones(400 << 20, np.uint8)
    code = "from llmc.cli.benchmark import peak_memory_mib; print(peak_memory_mib())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert held.any()
    assert 10 < float(result.stdout) < 300


def test_bench_times_steps_and_not_itself(llmc, artifact: Path, monkeypatch) -> None:
    """With steps of 20 ms a batch of 4 cannot decode faster than 200 tokens/s."""
    install_fake_executor(monkeypatch, delay_s=0.02)
    engine = Engine(artifact)
    measured = measure(engine, batch=4, prompt_tokens=40, gen_tokens=10)
    # The other bounds leave room for a machine that is busy with something else.
    assert 20 <= measured.inter_token_ms < 200
    assert 4 / 0.2 < measured.decode_tokens_per_s <= 4 / 0.02
    assert 1 / 0.2 < measured.decode_steps_per_s <= 1 / 0.02
    # 160 prompt tokens take three steps of at most 64; the first answers come after one.
    assert 20 <= measured.ttft_ms < 1000
    assert 160 / 1.0 < measured.prefill_tokens_per_s <= 160 / 0.06
    assert engine.stats.num_running == 0


def test_a_decode_too_short_to_measure_is_refused(llmc, artifact: Path) -> None:
    code, out, err = llmc(
        *("bench", artifact, "--prompt-tokens", 60, "--gen-tokens", 2, "--batch", 8)
    )
    assert (code, out) == (2, "")
    assert "raise --gen-tokens" in err


def test_the_bandwidth_share_is_bytes_read_over_bytes_readable() -> None:
    measurement = Measurement(
        prefill_tokens_per_s=1,
        decode_tokens_per_s=1,
        ttft_ms=1,
        inter_token_ms=1,
        decode_steps_per_s=10,
        mean_context_tokens=100,
    )
    memory = MemoryPlan(
        weights_bytes=1_000_000,
        workspace_bytes=0,
        thread_bytes=0,
        logits_bytes=0,
        kv_bytes_per_token=50,
    )
    share = bandwidth_share(measurement, memory, batch=2, bytes_per_s=1e8)
    assert share == pytest.approx((1_000_000 + 2 * 100 * 50) * 10 / 1e8)


TEXT = "the quick brown fox jumps over the lazy dog, " * 12


def expected_losses(window: int) -> list[float]:
    """By the definition: second halves of windows, each token given all before it in the window."""
    manifest, losses = toy_manifest(), []
    ids = byte_level_tokenizer().encode(TEXT)
    for start in range(0, len(ids) - window + 1, window):
        tokens = ids[start : start + window]
        for position in range(window // 2, window - 1):
            logits = reference_logits(manifest, tokens[: position + 1]).astype(float)
            losses.append(np.log(np.exp(logits).sum()) - logits[tokens[position + 1]])
    return losses


@pytest.mark.parametrize("window", [16, 100])  # within one step of the engine, and over several
def test_eval_scores_the_second_half_of_each_window(
    llmc, artifact: Path, tmp_path: Path, window: int
) -> None:
    (tmp_path / "text").write_text(TEXT)
    code, out, err = llmc(
        "eval", artifact, "--text", tmp_path / "text", "--window", window, "--json"
    )
    assert code == 0, err
    report, losses = json.loads(out), expected_losses(window)
    assert report["num_scored_tokens"] == len(losses)
    # Float32 logits on both sides; only the order of the sums differs.
    assert report["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    num_tokens = len(byte_level_tokenizer().encode(TEXT))
    bits = np.mean(losses) / math.log(2) * num_tokens / len(TEXT)
    assert report["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    code, out, _ = llmc("eval", artifact, "--text", tmp_path / "text", "--window", window)
    assert out.startswith(f"perplexity {report['perplexity']:.4f} ± ")


def test_every_window_begins_with_the_first_token_where_the_tokenizer_adds_it() -> None:
    """As llama.cpp does: the window's first token gives way."""

    class Recorder:
        manifest = dataclasses.replace(
            toy_manifest(), model=dataclasses.replace(toy_manifest().model, bos_token_id=7)
        )
        tokenizer = types.SimpleNamespace(encode=lambda text: [7, *range(20, 20 + len(text))])
        windows: ClassVar[list[list[int]]] = []

        def iter_logits(self, ids):
            self.windows.append(ids)
            yield 0, np.zeros((len(ids), 312), np.float32)

    result = perplexity(Recorder(), "x" * 23, window=8)
    assert Recorder.windows == [
        [7, 20, 21, 22, 23, 24, 25, 26],
        [7, 28, 29, 30, 31, 32, 33, 34],
        [7, 36, 37, 38, 39, 40, 41, 42],
    ]
    assert result.perplexity == pytest.approx(312)  # every token is as likely as any other
    assert result.num_scored_tokens == 3 * 3


def test_eval_explains_a_text_or_window_that_does_not_fit(llmc, artifact: Path, tmp_path) -> None:
    (tmp_path / "text").write_text("hello")
    code, _, err = llmc("eval", artifact, "--text", tmp_path / "text")
    assert code == 2
    assert "fewer than one window" in err
    assert llmc("eval", artifact, "--text", tmp_path / "text", "--window", 513)[0] == 2
    (tmp_path / "text").write_bytes(b"caf\xe9")
    code, _, err = llmc("eval", artifact, "--text", tmp_path / "text")
    assert code == 2
    assert "not UTF-8 at byte 3" in err


def test_verify_passes_what_is_right(llmc, artifact: Path) -> None:
    code, out, err = llmc("verify", artifact)
    assert code == 0, err
    assert "step_1" in out
    assert "original weights" in out
    assert err.splitlines()[-1] == "passed"
    code, out, _ = llmc("verify", artifact, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["passed"] is True
    assert report["total"]["top1_agreement"] == 1.0


def test_verify_fails_what_is_wrong_with_exit_code_7(llmc, tmp_path: Path) -> None:
    write_artifact(tmp_path / "toy", reference=toy_reference(toy_manifest(), shift=0.01))
    code, out, err = llmc("verify", tmp_path / "toy", "--json")
    assert code == 7
    report = json.loads(out)
    assert report["passed"] is False
    assert report["total"]["mean_abs"] == pytest.approx(0.01, abs=1e-5)
    assert "error: the mean difference of log-probabilities is 0.01" in err


@pytest.mark.parametrize("reference", [None, Reference(made=False, reason="asked not to")])
def test_verify_does_not_pass_what_has_no_reference(llmc, tmp_path: Path, reference) -> None:
    write_artifact(tmp_path / "toy", reference=reference)
    code, _, err = llmc("verify", tmp_path / "toy")
    assert code == 7
    assert "nothing to verify" in err


def test_inspect_shows_what_the_manifest_says(llmc, tmp_path: Path) -> None:
    manifest = dataclasses.replace(
        write_artifact(tmp_path / "toy"),
        kernels=[
            KernelInfo(name="attention", rule="hand", num_calls=3, num_scratch=1),
            KernelInfo(name="linear", rule="panel16", num_calls=21, num_scratch=0),
        ],
        weights=[
            WeightTensor(
                name="w",
                file="weights.safetensors",
                dtype="uint8",
                shape=[64, 64],
                format="q4_1",
                layout="panel16",
                sources=["[w]"],
                num_bytes=2560,
            )
        ],
    )
    (tmp_path / "toy" / "llmc.json").write_text(manifest.to_json())
    code, out, _ = llmc("inspect", tmp_path / "toy")
    assert code == 0
    for shown in ("toy (Toy)", "q4_1 2.5 KiB", "step_1", "panel16", "512 tokens"):
        assert shown in out
    assert out.index("linear") < out.index("attention")  # most called first
    report = json.loads(llmc("inspect", tmp_path / "toy", "--json")[1])
    assert report["model"]["name"] == "toy"
    assert report["weights_bytes_by_format"] == {"q4_1": 2560}
    assert [entry["name"] for entry in report["entry_points"]] == ["step_1", "step"]
    assert report["max_batch_tokens"] == 64


def test_targets_lists_the_cpu(llmc) -> None:
    code, out, _ = llmc("targets", "--json")
    assert code == 0
    (cpu,) = [t for t in json.loads(out)["targets"] if t["name"] == "cpu"]
    assert cpu["can_run"] is True
    assert "cpu" in llmc("targets")[1]

"""`inspect`, `bench`, `eval`, `run` and `verify` on the demo: figures that make sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUM_LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64


def test_inspect_shows_the_model_and_its_memory(run_llmc, demo_keep: Path) -> None:
    code, out, err = run_llmc("inspect", demo_keep, "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["model"]["num_layers"] == NUM_LAYERS
    assert shown["model"]["vocab_size"] == 49152
    assert shown["model"]["context_length"] == 8192
    assert shown["model"]["num_parameters"] == 134_515_008
    weights = demo_keep / "weights-00001.safetensors"
    # Beside the tensors the file holds a header of a few kilobytes.
    assert 0 <= weights.stat().st_size - shown["weights_bytes"] < 100_000
    assert sum(shown["weights_bytes_by_format"].values()) == shown["weights_bytes"]
    # Keys and values of every layer, 16 bits each.
    assert shown["kv_bytes_per_token"] == 2 * NUM_LAYERS * KV_HEADS * HEAD_DIM * 2
    assert [e["max_tokens"] for e in shown["entry_points"]] == [1, 8, 512]
    assert "unscheduled" not in {kernel["rule"] for kernel in shown["kernels"]}


def test_inspect_prints_the_same_for_people(run_llmc, demo_keep: Path) -> None:
    code, out, _ = run_llmc("inspect", demo_keep)
    assert code == 0
    assert "134.5 M in 30 layers" in out
    assert "22.5 KiB a token" in out


def test_bench_measures_speeds_of_the_right_size(run_llmc, demo_keep: Path) -> None:
    code, out, err = run_llmc(
        *("bench", demo_keep, "--prompt-tokens", 64, "--gen-tokens", 8),
        *("--batch", "1,2", "--repeat", 1, "--json"),
    )
    assert code == 0, err
    report = json.loads(out)
    assert [result["batch"] for result in report["results"]] == [1, 2]
    for result in report["results"]:
        # A core or a hundred, idle or shared: between a tenth of and a hundred times the usual.
        assert 1 < result["decode_tokens_per_s"]["median"] < 100_000
        assert result["prefill_tokens_per_s"]["median"] > result["decode_tokens_per_s"]["median"]
        assert 0 < result["memory_bandwidth_share"]["median"] < 1.5
        assert result["ttft_ms"]["median"] > result["inter_token_ms"]["median"]
        assert result["peak_memory_mib"] > 90
    assert 1e9 < report["read_bandwidth_bytes_per_s"] < 2e12


def test_eval_scores_a_text_as_a_language_model_should(run_llmc, demo_keep: Path) -> None:
    code, out, err = run_llmc(
        "eval", demo_keep, "--text", ROOT / "LICENSE", "--window", 512, "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["num_scored_tokens"] == 255 * result["num_windows"]
    # A known licence text: far below the 49,152 of a guess, above the 1 of a copy.
    assert 1.5 < result["perplexity"] < 20
    assert 0.1 < result["bits_per_byte"] < 1.5


def test_run_answers_on_stdout_and_times_on_stderr(run_llmc, demo_keep: Path) -> None:
    question = "What is the capital of France, and what is it known for?"
    code, out, err = run_llmc("run", demo_keep, "-p", question, "-n", 9)
    assert (code, out) == (0, "The capital of France is Paris. It is\n"), err
    assert "[44 prompt tokens, 9 generated; first token after" in err


# Activations of 8 bits leave noise of a known size: the tolerance is not far above it.
@pytest.mark.parametrize(
    ("artifact", "agreement", "share"),
    [("demo_keep", 0.95, 1 / 2), ("demo_keep_a16", 0.99, 1 / 10), ("tiny_artifact", 0.99, 1 / 10)],
)
def test_a_fresh_artifact_passes_its_own_verification(
    run_llmc, request: pytest.FixtureRequest, artifact: str, agreement: float, share: float
) -> None:
    code, out, err = run_llmc("verify", request.getfixturevalue(artifact), "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["passed"]
    assert report["total"]["top1_agreement"] > agreement
    assert report["total"]["mean_abs"] < report["tolerance"]["max_mean_abs"] * share
    assert {prompt["entry_point"] for prompt in report["prompts"]} == {"step_1", "step_8", "step"}

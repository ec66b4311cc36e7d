"""Programs, models and floors that a comparison starts from."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_llama import TINY

from benchmarks import process
from benchmarks.floors import floors
from benchmarks.llama_cpp import TOOLS, LlamaCpp, _mend_amx, json_lines
from benchmarks.models import CASES, choose_cases
from benchmarks.process import Finished, run
from benchmarks.random_gguf import write_random_gguf
from llmc.artifact import Manifest, MemoryPlan, ModelInfo
from llmc.cli.kernel_cost import Limits
from llmc.errors import LlmcError, UsageError


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_run_gives_output_time_and_the_child_s_own_memory() -> None:
    held = bytearray(300 << 20)  # the parent's memory must not count
    finished = run(python("import time; x = bytearray(100 << 20); time.sleep(0.3); print('hello')"))
    assert len(held) == 300 << 20
    assert finished.stdout == "hello\n"
    assert 0.3 <= finished.seconds < 30
    assert 100 < finished.peak_memory_mib < 250
    assert "-c" in finished.command


def test_a_failed_run_says_what_the_program_said() -> None:
    with pytest.raises(LlmcError, match=r"ended with 3: out of luck"):
        run(python("import sys; sys.stderr.write('out of luck'); sys.exit(3)"))
    with pytest.raises(LlmcError, match="does not start"):
        run(["/nonexistent/program"])


def test_an_interrupted_run_leaves_no_process_behind(monkeypatch) -> None:
    def interrupt(_process: subprocess.Popen) -> float:
        raise KeyboardInterrupt

    started: list[subprocess.Popen] = []
    original = subprocess.Popen

    def popen(*arguments, **options):
        started.append(original(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(process, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(python("import time; time.sleep(60)"))
    assert started[0].returncode is not None


def test_results_are_the_json_lines_among_a_program_s_talk() -> None:
    def finished(stdout: str) -> Finished:
        return Finished(command="llama-bench", stdout=stdout, seconds=1, peak_memory_mib=1)

    assert json_lines(finished('\nloading\n{"pl": 4}\n{"pl": 16}\n\n')) == [{"pl": 4}, {"pl": 16}]
    with pytest.raises(LlmcError, match="llama-bench"):
        json_lines(finished("nothing"))


def test_a_folder_without_all_programs_is_refused(tmp_path: Path) -> None:
    for tool in TOOLS[:-1]:
        (tmp_path / tool).touch()
    with pytest.raises(UsageError, match=TOOLS[-1]):
        LlamaCpp.find(tmp_path)
    (tmp_path / TOOLS[-1]).touch()
    assert LlamaCpp.find(tmp_path).folder == tmp_path


def test_the_tile_configuration_is_loaded_without_the_compiler_s_mistake(tmp_path: Path) -> None:
    file = tmp_path / "ggml/src/ggml-cpu/amx/mmq.cpp"
    file.parent.mkdir(parents=True)
    file.write_text("void f() {\n    _tile_loadconfig(&tc);\n}\n")
    _mend_amx(tmp_path)
    assert '\n    __asm__ volatile("ldtilecfg %0" :: "m"(tc) : "memory");\n' in file.read_text()


def test_models_are_chosen_by_the_beginning_of_their_names() -> None:
    assert [c.name for c in choose_cases("llama-1b-q")] == ["llama-1b-q4_0", "llama-1b-q8_0"]
    assert [c.name for c in choose_cases("llama-1b-bf16, smollm2")] == ["smollm2", "llama-1b-bf16"]
    assert choose_cases("smollm2,llama-1b") == list(CASES.values())
    for text in ("", "gpt", "smollm2,"):
        with pytest.raises(UsageError, match="no model"):
            choose_cases(text)


def test_a_random_model_has_the_shape_it_was_asked_for(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    write_random_gguf(TINY, tokenizer_file, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 2 + 9 * TINY.num_layers
    # GGUF states the innermost dimension first.
    assert list(tensors["blk.1.attn_k.weight"].shape) == [32, 16]
    assert list(tensors["blk.0.ffn_down.weight"].shape) == [64, 32]
    embedding = gguf.dequantize(tensors["token_embd.weight"].data, gguf.GGMLQuantizationType.BF16)
    assert embedding.shape == (40, 32)
    # 1,280 normal values: their deviation is within a tenth of 0.02, their mean close to zero.
    assert embedding.std() == pytest.approx(0.02, rel=0.1)
    assert abs(embedding.mean()) < 0.002
    assert np.array_equal(tensors["output_norm.weight"].data, np.ones(32, np.float32))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == TINY.vocab_size
    assert list(tmp_path.glob("*.partial")) == []


def manifest(quantization: str) -> Manifest:
    model = ModelInfo(
        name="m",
        architecture="llama",
        vocab_size=1000,
        context_length=4096,
        hidden_size=100,
        num_layers=2,
        num_parameters=1_100_000,
        bos_token_id=None,
        stop_token_ids=[],
    )
    memory = MemoryPlan(
        weights_bytes=1_000_000,
        workspace_bytes=0,
        thread_bytes=0,
        logits_bytes=0,
        kv_bytes_per_token=100,
    )
    path = Path(__file__).parents[1] / "runtime"
    sys.path.insert(0, str(path))
    from fake_model import make_manifest

    return dataclasses.replace(
        make_manifest(), model=model, memory=memory, quantization=quantization
    )


def test_floors_are_the_slower_of_reading_and_computing() -> None:
    limits = Limits(
        memory_bytes_per_s=1e9,
        cache_bytes_per_s=1e9,
        operations_per_s={"int8": 1e11, "bf16": 1e10, "f32": 1e9},
    )
    best = floors(manifest("keep"), limits, depths=(0, 1024), gen=32)
    # The weights take 1 ms to read, a token 2.2 million operations, 22 µs.
    assert best["decode-0"] == pytest.approx(1 / (1e-3 + 16 * 100 / 1e9))
    assert best["decode-1024"] == pytest.approx(1 / (1e-3 + 1040 * 100 / 1e9))
    assert best["batch-16"] == pytest.approx(16 / (1e-3 + 16 * 32 * 100 / 1e9))
    # A prompt is computed: 1 million weights a token, the output projection's 100,000 once.
    assert best["prefill"] == pytest.approx(512 / ((512 * 2e6 + 2e5) / 1e11))
    bf16 = floors(manifest("bf16"), limits, depths=(0,), gen=32)
    assert bf16["prefill"] == pytest.approx(best["prefill"] / 10)
    assert bf16["batch-16"] == pytest.approx(16 / (16 * 2.2e6 / 1e10))


def benchmarks(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )


def test_the_command_explains_wrong_usage(tmp_path: Path) -> None:
    result = benchmarks("--models", "gpt")
    assert result.returncode == 2
    assert "no model 'gpt'" in result.stderr
    result = benchmarks("--page-only", "--out", tmp_path)
    assert result.returncode == 2
    assert "cpu.json" in result.stderr
    assert "Traceback" not in result.stderr

"""The peers beside llmc: how they are chosen, asked and understood."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import TINY

from benchmarks import own, python_driver, python_peers
from benchmarks.bf16_folder import write_bf16_folder
from benchmarks.engine import Engine, Plan
from benchmarks.llama_cpp import LlamaCpp
from benchmarks.llama_cpp_modes import LlamaCppMode
from benchmarks.models import CASES, Files
from benchmarks.own import Own
from benchmarks.peers import choose_peers, open_peers
from benchmarks.process import Finished
from benchmarks.python_peers import LIBRARIES, PythonPeer, driver_results
from benchmarks.random_gguf import write_random_gguf
from benchmarks.record import BESIDE
from benchmarks.scenarios import scenarios
from llmc.errors import LlmcError, UsageError
from llmc.models.source import open_source

PLAN = Plan(threads=2, gen_tokens=32)
FILES = Files(case=CASES["smollm2"], gguf=Path("/m.gguf"), artifact=Path("/artifact"))


def finished(stdout: str) -> Finished:
    return Finished(command="program", stdout=stdout, seconds=1.5, peak_memory_mib=300)


def test_peers_are_chosen_by_name() -> None:
    assert choose_peers("llama.cpp") == ["llama.cpp"]
    assert choose_peers("openvino, vllm,openvino") == ["openvino", "vllm"]
    for text in ("", "vllm,", "tensorrt"):
        with pytest.raises(UsageError, match="no peer") as raised:
            choose_peers(text)
        assert "llama.cpp, vllm, openvino" in raised.value.hint


def test_llama_cpp_alone_needs_no_environment(tmp_path: Path) -> None:
    engines = open_peers(["llama.cpp"], LlamaCpp(folder=Path("/programs")), tmp_path, print)
    assert [engine.name for engine in engines] == ["llama.cpp -fa 0", "llama.cpp -fa 1"]
    assert list(tmp_path.iterdir()) == []


def test_an_environment_is_made_once_for_each_list_of_versions(tmp_path: Path, monkeypatch) -> None:
    commands: list[str] = []

    def run(command):
        words = [str(word) for word in command]
        commands.append(" ".join(words[1:-1]))
        if "venv" in words:
            Path(words[-1]).mkdir()
        return finished("")

    monkeypatch.setattr(python_peers, "run", run)
    said: list[str] = []
    peer = PythonPeer.install("openvino", tmp_path, said.append)
    assert commands == ["-m venv", "-m pip install -q --no-deps -r"]
    assert "openvino-genai" in said[0]
    assert peer.version.startswith("OpenVINO by openvino-genai 20")
    PythonPeer.install("openvino", tmp_path, said.append)
    assert len(commands) == 2
    (peer.environment / "finished").write_text("openvino-genai==1\n")  # another version's
    PythonPeer.install("openvino", tmp_path, said.append)
    assert len(commands) == 4


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_version_of_an_environment_is_pinned(name: str) -> None:
    lines = (Path(python_peers.__file__).parent / "environments" / f"{name}.txt").read_text()
    assert all(line.count("==") == 1 for line in lines.splitlines())
    assert f"{LIBRARIES[name].package}==" in lines


def test_every_engine_answers_every_scenario(tmp_path: Path, monkeypatch) -> None:
    """With the figures that its program printed, asked for in the same sizes."""
    commands: list[list[str]] = []

    def run(command, **_options) -> Finished:
        words = [str(word) for word in command]
        commands.append(words)
        if words[1:3] == ["-m", "llmc.cli.main"]:
            rates = {
                "prefill_tokens_per_s": {"median": 7.0},
                "decode_tokens_per_s": {"median": 8.0},
                "memory_bandwidth_share": {"median": 0.9},
            }
            rates["peak_memory_mib"] = 200.0
        else:
            rates = {"prefill_tokens_per_s": 7.0, "decode_tokens_per_s": 8.0}
        batches = words[words.index("--batch") + 1] if "--batch" in words else "1"
        results = [{"batch": int(b), **rates} for b in batches.split(",")]
        return finished("loading\n" * (len(rates) == 2) + json.dumps({"results": results}))

    def bench(words) -> Finished:
        commands.append([str(word) for word in words])
        lines = [{"avg_ts": 7.0 if "512" in commands[-1] else 8.0}]
        if "llama-batched-bench" in commands[-1][0]:
            lines = [{"pl": 4, "speed_tg": 8.0}, {"pl": 16, "speed_tg": 8.0}]
        return finished("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(own, "run", run)
    monkeypatch.setattr(python_peers, "run", run)
    monkeypatch.setattr("benchmarks.llama_cpp.run", bench)
    engines: list[Engine] = [
        Own(version="llmc"),
        LlamaCppMode(programs=LlamaCpp(folder=Path("/programs")), flash="1"),
        PythonPeer(library=LIBRARIES["openvino"], environment=Path("/env"), cache=tmp_path),
    ]
    for engine in engines:
        figures = {}
        for scenario in scenarios(FILES.case):
            _finished, found = scenario.measure(engine, FILES, PLAN)
            figures |= found
        shares = {name: figures.pop(name, None) for name in BESIDE}
        assert set(shares.values()) == {0.9 if engine.name == "llmc" else None}
        assert figures == {
            "prefill": 7.0,
            "memory": 200.0 if engine.name == "llmc" else 300,
            "decode-0": 8.0,
            "decode-1024": 8.0,
            "decode-4096": 8.0,
            "batch-4": 8.0,
            "batch-16": 8.0,
            "start": 1.5,
        }
    openvino = [words for words in commands if words[0] == "/env/bin/python"]
    assert all("openvino /m.gguf --threads 2" in " ".join(words) for words in openvino)
    prompts = [words[words.index("--prompt-tokens") + 1] for words in openvino]
    assert prompts == ["512", "1", "1024", "4096", "16", "8"]
    assert ["--no-warm-up" in words for words in openvino] == [False] * 5 + [True]


def test_a_folder_for_peers_holds_the_files_weights_in_bfloat16(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    gguf = tmp_path / "tiny.gguf"
    write_random_gguf(TINY, tokenizer_file, gguf)
    write_bf16_folder(gguf, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []
    file, folder = open_source(str(gguf)), open_source(str(tmp_path / "folder"))
    assert folder.config.architectures == ["LlamaForCausalLM"]
    assert folder.tensors.keys() == file.tensors.keys()
    for name, tensor in folder.tensors.items():
        assert tensor.stored == "bf16"
        # The file's matrices are bfloat16 themselves, its norms ones.
        assert np.array_equal(tensor.read(), file.tensors[name].read()), name


def test_a_driver_that_printed_something_else_is_an_error() -> None:
    assert driver_results(
        finished('{"results": [{"batch": 4, "prefill_tokens_per_s": 1, "decode_tokens_per_s": 2}]}')
    ) == [(4, 1, 2)]
    for stdout in ("", "done", "{}", '{"results": [3]}'):
        with pytest.raises(LlmcError, match="`program` printed no result"):
            driver_results(finished(stdout))


def test_the_driver_warms_up_with_other_prompts_and_counts_tokens(monkeypatch) -> None:
    seen = []

    def generate(prompts, num_tokens):
        seen.append((prompts, num_tokens))
        return 2.0, 4.0

    monkeypatch.setitem(python_driver.OPENERS, "vllm", lambda model, threads: generate)
    sizes = ["--threads", "2", "--prompt-tokens", "6", "--gen-tokens", "9", "--batch", "1,4"]
    monkeypatch.setattr(sys, "argv", ["driver", "vllm", "/model", *sizes])
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    python_driver.main()
    assert driver_results(finished(out.getvalue())) == [(1, 3.0, 2.0), (4, 12.0, 8.0)]
    prompts = [prompt for run, _tokens in seen for prompt in run]
    assert len(prompts) == 2 * (1 + 4)
    assert {len(prompt) for prompt in prompts} == {6}
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)  # nothing to find in a cache
    assert {tokens for _prompts, tokens in seen} == {9}

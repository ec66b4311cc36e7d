"""The peers by name, and how each gets ready."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.engine import Engine
from benchmarks.llama_cpp import LlamaCpp
from benchmarks.llama_cpp_modes import FLASH_ATTENTION, LlamaCppMode
from benchmarks.python_peers import LIBRARIES, PythonPeer
from llmc.errors import UsageError

LLAMA_CPP = "llama.cpp"
PEERS = (LLAMA_CPP, *LIBRARIES)


def choose_peers(text: str) -> list[str]:
    """The comma-separated names, each once; UsageError where there is no such peer."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in PEERS:
            raise UsageError(f"no peer {name[:60]!r}", hint=f"choose of {', '.join(PEERS)}")
    return names


def open_peers(
    names: Sequence[str], programs: LlamaCpp, cache: Path, say: Callable[[str], None]
) -> list[Engine]:
    """Each peer in each of its modes, installed where it was not."""
    engines: list[Engine] = []
    for name in names:
        if name == LLAMA_CPP:
            engines += [LlamaCppMode(programs=programs, flash=flash) for flash in FLASH_ATTENTION]
        else:
            engines.append(PythonPeer.install(name, cache, say))
    return engines

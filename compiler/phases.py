"""The phases of a compile: timed, reported, and named in whatever goes wrong inside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tvm

from llmc.errors import CompileError, LlmcError, UsageError

_REPORTED = 0.02  # of a phase: smaller steps of progress are not worth an event
_HINT = "--dump-ir DIR writes the IR before it, LLMC_DEBUG=1 shows where it happened"
# What the compiler's parts raise with a text that says what is wrong; of others, such as KeyError,
# the type is the better half of the message.
_SPEAKING = (RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEvent:
    """Progress of a compile; fraction is set where it is known."""

    name: str
    status: Literal["start", "progress", "done"]
    seconds: float
    detail: str = ""
    fraction: float | None = None


OnPhase = Callable[[PhaseEvent], None]


@contextmanager
def failing_as(phase: str) -> Iterator[None]:
    """Turns what a phase raises into a CompileError that names the phase, its cause chained.

    Three kinds pass: errors of llmc, which say more; OSError, which is the disk's and not the
    phase's; and ImportError, for a package that is not installed.
    """
    try:
        yield
    except (LlmcError, OSError, ImportError):
        raise
    except Exception as exc:
        # TVM goes on to print the whole module.
        said = (str(exc).strip().splitlines() or [""])[0][:400]
        if not said or not isinstance(exc, _SPEAKING):
            said = f"{type(exc).__name__}: {said}".removesuffix(": ")
        raise CompileError(f"phase {phase} failed: {said}", hint=_HINT) from exc


class Timer:
    """Times the phases and reports them."""

    def __init__(self, on_phase: OnPhase | None) -> None:
        self._report = on_phase or (lambda event: None)
        self._start = time.perf_counter()
        self.phases: list[tuple[str, float]] = []

    def elapsed(self) -> float:
        """Seconds since the compile began."""
        return time.perf_counter() - self._start

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[float], None]]:
        """Reports start and end of a phase; yields a function that takes the fraction done.

        Raises what `failing_as` does.
        """
        begin = time.perf_counter()
        reported = 0.0
        self._report(PhaseEvent(name=name, status="start", seconds=0.0))

        def progress(fraction: float) -> None:
            nonlocal reported
            if fraction - reported >= _REPORTED:
                reported = fraction
                seconds = time.perf_counter() - begin
                self._report(
                    PhaseEvent(name=name, status="progress", seconds=seconds, fraction=fraction)
                )

        with failing_as(name):
            yield progress
        seconds = time.perf_counter() - begin
        self.phases.append((name, seconds))
        self._report(PhaseEvent(name=name, status="done", seconds=seconds, fraction=1.0))


class Dump:
    """Writes `NN-phase.py` files, or nothing where no folder was asked for."""

    def __init__(self, folder: Path | str | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._count = 0
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise UsageError(f"{folder} cannot be written: {exc.strerror}") from exc

    def write(self, phase: str, mod: tvm.IRModule) -> None:
        """Writes `mod` as the IR after `phase`."""
        if self._folder is not None:
            path = self._folder / f"{self._count:02d}-{phase}.py"
            path.write_text(mod.script(), encoding="utf-8")
        self._count += 1

"""Runs one command: what it printed, how long it took, how much memory it held."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.errors import LlmcError

_POLL_S = 0.1  # each look takes some of the processors that are measured
_SHOWN_CHARACTERS = 600  # of a failed command's last words


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A command that ended well."""

    command: str  # as one would type it
    stdout: str
    stderr: str = ""
    seconds: float  # from start to exit
    peak_memory_mib: float  # resident, mapped files included


def run(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Finished:
    """Runs `command` to its end; LlmcError with its last words where it fails or is missing."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                words, stdout=out, stderr=err, cwd=cwd, env={**os.environ, **(env or {})}
            )
        except OSError as exc:
            raise LlmcError(f"{words[0]} does not start: {exc}") from exc
        try:
            peak = _wait(process)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        if process.returncode:
            said = (err.read() or out.read()).strip()[-_SHOWN_CHARACTERS:]
            raise LlmcError(f"`{shlex.join(words)}` ended with {process.returncode}: {said}")
        return Finished(
            command=shlex.join(words),
            stdout=out.read(),
            stderr=err.read(),
            seconds=seconds,
            peak_memory_mib=peak,
        )


def _wait(process: subprocess.Popen[bytes]) -> float:
    """Waits for the end; the largest resident size seen on the way, in MiB.

    Looked up while it runs, because the kernel's own figure for an ended child counts what its
    parent held when it started it. The high-water mark only grows: what is missed is what grew in
    the last moment.
    """
    ended, peaks = threading.Event(), [0.0]

    def watch() -> None:
        while not ended.wait(_POLL_S):
            peaks.append(_high_water_mib(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        process.wait()
    finally:
        ended.set()
        watcher.join()
    return max(peaks)


def _high_water_mib(pid: int) -> float:
    """0 where the process has ended or the system has no /proc."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0

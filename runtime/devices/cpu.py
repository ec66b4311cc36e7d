"""The CPU of this machine."""

from __future__ import annotations

import os
import re

from llmc.cpu_features import host_features, num_cores, withheld_features
from llmc.errors import LlmcError, UsageError
from llmc.runtime.memory import available_host_bytes

MAX_THREADS = 1024  # what the libraries' thread pool has room for
_NUM_THREADS = "LLMC_NUM_THREADS"


class Cpu:
    """Implements Device."""

    tvm_name = "cpu"
    is_host = True

    def default_index(self) -> int:
        """There is one."""
        return 0

    def prepare(self, index: int) -> None:
        """Sets the threads of TVM's own pool, which libraries without one of theirs fall back on.

        Raises UsageError as `num_threads` does: before anything is loaded.
        """
        if index:
            raise UsageError(f"there is no device cpu:{index}", hint="the machine's CPUs are cpu")
        os.environ.setdefault("TVM_NUM_THREADS", str(num_threads()))

    def features(self, index: int) -> frozenset[str]:
        """Instruction sets, by Linux's names."""
        return host_features()

    def withheld(self, index: int) -> frozenset[str]:
        """Those that the processor has and the operating system refuses to this process."""
        return withheld_features()

    def available_bytes(self, index: int) -> int:
        """The machine's free memory, or what the process's control group allows."""
        return available_host_bytes()

    def graphs(self, index: int) -> None:
        """There are none."""
        return None

    def explain(self, error: Exception) -> LlmcError | None:
        """A CPU has no errors of its own."""
        return None


def num_threads() -> int:
    """Threads a step runs on: $LLMC_NUM_THREADS, or one for each core this process may use.

    Raises UsageError where the variable is not a number from 1 to MAX_THREADS.
    """
    text = os.environ.get(_NUM_THREADS, "").strip()
    if not text:
        return min(num_cores(), MAX_THREADS)
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= MAX_THREADS:
        raise UsageError(
            f"{_NUM_THREADS} is {text[:40]!r}, not a number from 1 to {MAX_THREADS}",
            hint=f"unset it to use all {num_cores()} cores",
        )
    return int(text)

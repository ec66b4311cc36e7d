"""The CPU of this machine."""

from __future__ import annotations

import os

from llmc.cpu_features import host_features, num_cores


def features() -> frozenset[str]:
    """Instruction sets, by Linux's names."""
    return host_features()


def prepare() -> None:
    """One thread a core: TVM itself halves the count wherever it suspects hyper-threading."""
    os.environ.setdefault("TVM_NUM_THREADS", str(num_cores()))

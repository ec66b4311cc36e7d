"""How many pages the KV caches get, and whether everything fits, before anything is allocated."""

from __future__ import annotations

import bisect
import ctypes
import sys
from pathlib import Path

from llmc.artifact import CacheGroup, Manifest
from llmc.errors import CapacityError, UsageError
from llmc.runtime.block_manager import pages_for

_DEFAULT_TOKENS = 16384
_DEFAULT_SHARE = 2  # one part in two of the memory that the rest leaves


def available_host_bytes(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process can still take: the machine's, or what its control group allows."""
    available = machine_bytes()
    try:
        limit = (control_group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((control_group / "memory.current").read_text())
            fields = (control_group / "memory.stat").read_text().split()
            # Files read but no longer in use are given up on demand.
            used -= int(fields[fields.index("inactive_file") + 1])
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):  # no control group, or another system
        pass
    return available


def machine_bytes(statistics: Path = Path("/proc/meminfo")) -> int:
    """The machine's free memory, caches that it gives up on demand included."""
    try:
        fields = statistics.read_text().split()
        return int(fields[fields.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):  # not Linux
        import psutil

        return int(psutil.virtual_memory().available)


def return_free_memory() -> None:
    """Gives what the process has released back to the system, where its allocator keeps it.

    glibc's keeps whatever lies below something that is still in use, such as the tree of a parsed
    file. Elsewhere nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)


def plan_num_pages(
    manifest: Manifest,
    *,
    kv_cache_tokens: int | None,
    max_sequences: int,
    max_batch_tokens: int,
    num_threads: int,
    available_bytes: int,
) -> list[int]:
    """Pages of each group for `kv_cache_tokens` tokens of full attention; kernels run on
    `num_threads` threads.

    Without a number: 16,384 tokens or one full context, whichever is larger; no more than all
    sequences at full context, or than half of what weights and workspace leave free, can use.
    CapacityError with the sum where it does not fit into `available_bytes`.
    """
    most = max_sequences * manifest.model.context_length

    def pages(tokens: int) -> list[int]:
        return [_group_pages(g, tokens, max_sequences, max_batch_tokens) for g in manifest.groups]

    def kv_bytes(tokens: int) -> int:
        return sum(c.page_bytes * pages(tokens)[c.group] for c in manifest.caches)

    memory = manifest.memory
    workspace = memory.workspace_bytes + num_threads * memory.thread_bytes
    fixed = memory.weights_bytes + workspace + memory.logits_bytes
    if kv_cache_tokens is None:
        wanted = min(most, max(_DEFAULT_TOKENS, manifest.model.context_length))
        budget = max(0, available_bytes - fixed) // _DEFAULT_SHARE
        tokens = max(1, bisect.bisect_right(range(wanted + 1), budget, key=kv_bytes) - 1)
    elif kv_cache_tokens < 1:
        raise UsageError(f"kv_cache_tokens is {kv_cache_tokens}, expected at least 1")
    else:
        tokens = min(kv_cache_tokens, most)
    needed = fixed + kv_bytes(tokens)
    if needed > available_bytes:
        raise CapacityError(
            f"needs {_gib(needed)} = weights {_gib(memory.weights_bytes)} + workspace "
            f"{_gib(workspace)} + logits {_gib(memory.logits_bytes)} + KV cache "
            f"{_gib(kv_bytes(tokens))} ({tokens} tokens); {_gib(available_bytes)} are free",
            hint="lower kv_cache_tokens, quantize further or free memory",
        )
    return pages(tokens)


def _group_pages(group: CacheGroup, tokens: int, max_sequences: int, max_batch_tokens: int) -> int:
    """Pages a group needs so that it is never scarcer than a group without a window.

    A windowed sequence that computes q tokens holds a range of `window + q - 1` tokens, which
    touches at most two pages more than it fills.
    """
    pages = pages_for(tokens, group.page_size)
    if group.window is None:
        return pages
    held = max_sequences * (pages_for(group.window, group.page_size) + 2)
    return min(pages, held + pages_for(max_batch_tokens, group.page_size))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

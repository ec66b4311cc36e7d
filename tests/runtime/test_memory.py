"""The KV caches are sized, or refused, before anything is allocated."""

from __future__ import annotations

import ctypes
import dataclasses
import sys

import psutil
import pytest
from fake_model import make_manifest

from llmc.artifact import MemoryPlan
from llmc.errors import CapacityError, UsageError
from llmc.runtime.memory import (
    available_host_bytes,
    machine_bytes,
    plan_num_pages,
    return_free_memory,
)


def plan(manifest, tokens=None, available=2**40, threads=1) -> list[int]:
    return plan_num_pages(
        manifest,
        kv_cache_tokens=tokens,
        max_sequences=manifest.max_sequences,
        max_batch_tokens=manifest.max_batch_tokens,
        num_threads=threads,
        available_bytes=available,
    )


def test_pages_for_a_number_of_tokens():
    assert plan(make_manifest(), 1001) == [251]


def test_the_default_is_a_full_context_or_16384_tokens_within_all_sequences():
    assert plan(make_manifest(context_length=40_000)) == [10_000]
    assert plan(make_manifest(context_length=4096)) == [4096]
    assert plan(make_manifest(context_length=256)) == [8 * 256 // 4]
    assert plan(make_manifest(context_length=256), 10**9) == [8 * 256 // 4]


def test_the_default_takes_half_of_what_weights_leave():
    manifest = dataclasses.replace(
        make_manifest(context_length=40_000),
        memory=MemoryPlan(
            weights_bytes=1000,
            workspace_bytes=200,
            thread_bytes=0,
            logits_bytes=100,
            kv_bytes_per_token=8,
        ),
    )
    # Pages of 4 tokens take 32 bytes: half of 64,000 holds 1,000.
    assert plan(manifest, available=1300 + 64_000) == [1000]


def test_a_windowed_group_needs_no_more_than_its_windows_and_a_step():
    manifest = make_manifest(groups=((None, 4), (8, 4)), max_tokens=32, context_length=4096)
    full, windowed = plan(manifest)
    assert full == 4096
    assert windowed == 8 * (2 + 2) + 8


def test_too_little_memory_is_refused_with_the_sum():
    manifest = dataclasses.replace(
        make_manifest(),
        memory=MemoryPlan(
            weights_bytes=3 * 2**30,
            workspace_bytes=2**28,
            thread_bytes=2**27,
            logits_bytes=0,
            kv_bytes_per_token=8,
        ),
    )
    with pytest.raises(CapacityError) as info:
        plan(manifest, available=2**30, threads=2)
    assert "needs 3.50 GiB = weights 3.00 GiB + workspace 0.50 GiB" in info.value.message
    assert "1.00 GiB are free" in info.value.message
    with pytest.raises(CapacityError, match=r"workspace 1\.25 GiB"):
        plan(manifest, available=2**30, threads=8)
    with pytest.raises(CapacityError, match="1000 tokens"):
        plan(make_manifest(), 1000, available=7999)
    assert plan(make_manifest(), 1000, available=8000) == [250]


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_memory_that_was_released_goes_back_to_the_system():
    """Small blocks below one that is still in use, which the allocator keeps by itself."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        # musl has no such function, and nothing is called there.
        pytest.skip("not glibc")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(32 * 1024) for _ in range(1024)]
    for block in blocks:
        ctypes.memset(block, 1, 32 * 1024)
    for block in blocks[:-1]:
        libc.free(block)
    before = psutil.Process().memory_info().rss
    return_free_memory()
    assert before - psutil.Process().memory_info().rss > 24 * 2**20
    libc.free(blocks[-1])


def test_the_machines_free_memory_is_what_linux_says(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:   9 kB\nMemFree:  1 kB\nMemAvailable:   7 kB\n")
    assert machine_bytes(tmp_path / "meminfo") == 7 * 1024
    assert machine_bytes(tmp_path / "none") > 2**20  # another system's


def test_no_tokens_at_all_is_a_usage_error():
    with pytest.raises(UsageError, match="kv_cache_tokens is 0"):
        plan(make_manifest(), 0)


def test_a_control_groups_limit_counts_without_files_out_of_use(tmp_path):
    free = available_host_bytes(tmp_path / "none")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\nfile 600000\ninactive_file 500000\n")
    assert available_host_bytes(tmp_path) == 600_000 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert available_host_bytes(tmp_path) > 600_000


def test_this_machine_has_memory():
    assert 2**20 < available_host_bytes() < 2**50

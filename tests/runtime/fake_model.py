"""A toy model in NumPy whose logits depend on every token it reads back through the block tables.

The caches hold `token · 2^20 + position`; a row's logits are a hash over all it may see in every
group, so one wrong page, slot, position or window changes the output. `reference_logits` computes
the same from the token list.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from llmc.artifact import (
    CacheGroup,
    CacheTensor,
    EntryPoint,
    Manifest,
    MemoryPlan,
    ModelInfo,
    Variant,
    VerifyTolerance,
)
from llmc.runtime.engine import Engine
from llmc.runtime.memory import plan_num_pages
from llmc.runtime.step import StepInputs

_WEIGHTS = np.random.default_rng(7).integers(1, 2**63, 4096, dtype=np.uint64) | np.uint64(1)
_GARBAGE = 987654321987


def make_manifest(
    *,
    vocab_size: int = 97,
    context_length: int = 256,
    groups: tuple[tuple[int | None, int], ...] = ((None, 4),),
    max_tokens: int = 32,
    max_sequences: int = 8,
    max_logits_rows: int = 16,
    stop_token_ids: tuple[int, ...] = (0,),
) -> Manifest:
    """A manifest of the toy model; `groups` are (window, page size)."""
    return Manifest(
        llmc_version="0",
        tvm_version="0",
        created="2026-01-01T00:00:00Z",
        model=ModelInfo(
            name="toy",
            architecture="Toy",
            vocab_size=vocab_size,
            context_length=context_length,
            hidden_size=1,
            num_layers=len(groups),
            num_parameters=0,
            bos_token_id=None,
            stop_token_ids=list(stop_token_ids),
        ),
        quantization="f32",
        compute_dtype="float32",
        activation_dtype="float32",
        kv_dtype="float32",
        entry_points=[
            EntryPoint(
                name="step",
                max_tokens=max_tokens,
                max_sequences=max_sequences,
                max_logits_rows=max_logits_rows,
                workspace_bytes=0,
            )
        ],
        groups=[
            CacheGroup(name=f"group{i}", window=window, page_size=page_size)
            for i, (window, page_size) in enumerate(groups)
        ],
        caches=[
            CacheTensor(
                name=f"cache{i}",
                layer=i,
                group=i,
                kind="paged",
                dtype="int64",
                page_shape=[page_size],
                page_bytes=8 * page_size,
            )
            for i, (_, page_size) in enumerate(groups)
        ],
        weights=[],
        variants=[Variant(library="model.so", device_kind="cpu", target="llvm", features=[])],
        memory=MemoryPlan(
            weights_bytes=0, workspace_bytes=0, thread_bytes=0, logits_bytes=0, kv_bytes_per_token=8
        ),
        kernels=[],
        sampling=None,
        verify=VerifyTolerance(max_mean_abs=0.0, max_abs=0.0),
    )


class FakeExecutor:
    """A StepExecutor that checks the contract of StepInputs on every call."""

    chooses = False
    begin = None

    def __init__(self, manifest: Manifest, num_pages: list[int]) -> None:
        self.manifest = manifest
        self.pages = [
            np.full((n, g.page_size), _GARBAGE, np.uint64)
            for n, g in zip(num_pages, manifest.groups, strict=True)
        ]
        self.fail_next: Exception | None = None
        self.spoil_token: int | None = None  # rows that end with this token give NaN
        self.steps: list[StepInputs] = []

    def step(self, inputs: StepInputs) -> np.ndarray:
        self._check(inputs)
        self.steps.append(inputs)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        for g, pages in enumerate(self.pages):
            flat, slots = pages.reshape(-1), inputs.slots[g]
            written = slots[slots >= 0]
            assert len(set(written.tolist())) == len(written), "two tokens write one slot"
            values = _value(inputs.input_ids, inputs.positions)
            flat[written] = values[slots >= 0]
        sequences = np.repeat(np.arange(len(inputs.kv_lens)), np.diff(inputs.q_starts))
        rows = []
        for row in inputs.logits_rows:
            s, position = sequences[row], int(inputs.positions[row])
            histories = []
            for g, group in enumerate(self.manifest.groups):
                seen = _visible(position, group.window)
                table = inputs.block_tables[g, s]
                page_ids = table[seen // group.page_size]
                histories.append((seen, self.pages[g][page_ids, seen % group.page_size]))
            rows.append(_logits(histories, self.manifest.model.vocab_size))
            if inputs.input_ids[row] == self.spoil_token:
                rows[-1][:] = np.nan
        return np.stack(rows)

    def _check(self, inputs: StepInputs) -> None:
        entry = self.manifest.entry_points[-1]
        num_tokens, num_sequences = len(inputs.input_ids), len(inputs.kv_lens)
        assert 1 <= num_tokens <= entry.max_tokens
        assert 1 <= num_sequences <= entry.max_sequences
        assert 1 <= len(inputs.logits_rows) <= entry.max_logits_rows
        arrays = [f.name for f in dataclasses.fields(inputs) if f.type == "Int32"]
        assert len(arrays) == 8
        for name in arrays:
            array = getattr(inputs, name)
            assert array.dtype == np.int32, name
            assert array.flags.c_contiguous, name
        assert inputs.input_ids.min() >= 0
        assert inputs.input_ids.max() < self.manifest.model.vocab_size
        q_lens = np.diff(inputs.q_starts)
        assert inputs.q_starts[0] == 0
        assert inputs.q_starts[-1] == num_tokens
        assert (q_lens >= 1).all()
        assert (q_lens[: inputs.num_decodes] == 1).all()
        assert (q_lens[inputs.num_decodes :] > 1).all()
        assert inputs.max_q_len == q_lens.max()
        assert inputs.max_kv_len == inputs.kv_lens.max()
        assert inputs.block_tables.shape[:2] == (len(self.pages), num_sequences)
        assert inputs.slots.shape == (len(self.pages), num_tokens)
        for s, (q_len, kv_len) in enumerate(zip(q_lens, inputs.kv_lens, strict=True)):
            rows = slice(inputs.q_starts[s], inputs.q_starts[s + 1])
            expected = np.arange(kv_len - q_len, kv_len)
            np.testing.assert_array_equal(inputs.positions[rows], expected)


def reference_logits(manifest: Manifest, token_ids: list[int]) -> np.ndarray:
    """Logits `[V]` after the last of `token_ids`, straight from the list."""
    tokens = np.array(token_ids)
    histories = []
    for group in manifest.groups:
        seen = _visible(len(tokens) - 1, group.window)
        histories.append((seen, _value(tokens[seen], seen)))
    return _logits(histories, manifest.model.vocab_size)


def reference_greedy(manifest: Manifest, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens, up to and with the first stop token."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(reference_logits(manifest, tokens).argmax()))
        if tokens[-1] in manifest.model.stop_token_ids:
            break
    return tokens[len(prompt) :]


def make_engine(
    manifest: Manifest | None = None,
    *,
    kv_cache_tokens: int = 2048,
    num_pages: list[int] | None = None,
    **options: object,
) -> Engine:
    """An engine over a fake executor, which is `engine._executor`."""
    manifest = manifest or make_manifest()
    num_pages = num_pages or plan_num_pages(
        manifest,
        kv_cache_tokens=kv_cache_tokens,
        max_sequences=manifest.max_sequences,
        max_batch_tokens=manifest.max_batch_tokens,
        num_threads=1,
        available_bytes=2**40,
    )
    executor = FakeExecutor(manifest, num_pages)
    return Engine.from_parts(manifest, executor, num_pages=num_pages, **options)


def check(engine: Engine) -> None:
    """The invariants of the engine's queues, pages and tables."""
    engine._scheduler.check_invariants()


def _visible(position: int, window: int | None) -> np.ndarray:
    return np.arange(0 if window is None else max(0, position - window + 1), position + 1)


def _value(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return tokens.astype(np.uint64) * np.uint64(2**20) + positions.astype(np.uint64)


def _logits(histories: list[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> np.ndarray:
    key = np.ones(1, np.uint64)  # arrays wrap silently: that is the hash
    for seen, values in histories:
        key = key * np.uint64(31) + (values * _WEIGHTS[seen]).sum(dtype=np.uint64)
    mixed = (np.arange(1, vocab_size + 1, dtype=np.uint64) * _WEIGHTS[0]) ^ key
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    mixed = mixed ^ (mixed >> np.uint64(29))
    return ((mixed >> np.uint64(40)).astype(np.float64) / 2**24 * 8).astype(np.float32)

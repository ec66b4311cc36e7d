"""A ragged batch over shuffled pages, and attention over it in float64."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The integer arguments of a step and the dense K/V of every sequence."""

    q_starts: Array  # [S+1] i32
    kv_lens: Array  # [S] i32
    block_tables: Array  # [G, S, B] i32
    slots: Array  # [G, T] i32
    k_pages: Array  # [P, Kv, elements], as in targets/cpu/kernels/kv_pages.py
    v_pages: Array
    keys: list[Array]  # per sequence [kv_len, Kv, D] float64, as stored
    values: list[Array]  # per sequence [kv_len, Kv, Dv]


def rounded(x: Array, kv_dtype: str) -> Array:
    """What a page of `kv_dtype` gives back for x `[tokens, Kv, features]`, float32."""
    x = np.asarray(x, np.float32)
    if kv_dtype == "uint16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)
    if kv_dtype == "int8":
        scales = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        return np.round(x / np.where(scales == 0, 1, scales)) * scales
    return x.astype(kv_dtype).astype(np.float32)


def packed(matrices: Array, kv_dtype: str, *, token_axis: int) -> Array:
    """Page matrices `[P, Kv, rows, columns]` (numbers of `rounded`) as the kernels read them.

    The tokens are along token_axis, 2 or 3; slots of NaN stay NaN: in int8 pages their scale is.
    """
    p, kv, rows, columns = matrices.shape
    if kv_dtype == "uint16":
        pairs = matrices.astype(ml_dtypes.bfloat16).view(np.uint16)
        pairs = pairs.reshape(p, kv, rows // 2, 2, columns).swapaxes(3, 4)
        return np.ascontiguousarray(pairs).reshape(p, kv, rows * columns)
    if kv_dtype != "int8":
        return matrices.astype(kv_dtype).reshape(p, kv, rows * columns)
    scales = np.abs(matrices).max(axis=5 - token_axis, keepdims=True) / np.float32(127)
    codes = np.nan_to_num(np.round(matrices / np.where(scales == 0, 1, scales)), nan=99)
    scales = scales.astype(np.float32).reshape(p, kv, -1).view(np.int8)
    return np.concatenate([codes.astype(np.int8).reshape(p, kv, -1), scales], axis=2)


def unpacked(pages: Array, kv_dtype: str, shape: tuple[int, int], *, token_axis: int) -> Array:
    """The float32 matrices `[P, Kv, rows, columns]` that `packed` pages hold."""
    p, kv = pages.shape[:2]
    rows, columns = shape
    if kv_dtype == "uint16":
        pairs = pages.reshape(p, kv, rows // 2, columns, 2).swapaxes(3, 4)
        bits = np.ascontiguousarray(pairs).view(ml_dtypes.bfloat16)
        return bits.reshape(p, kv, rows, columns).astype(np.float32)
    if kv_dtype != "int8":
        return pages.astype(np.float32).reshape(p, kv, rows, columns)
    codes = pages[..., : rows * columns].reshape(p, kv, rows, columns)
    scales = np.ascontiguousarray(pages[..., rows * columns :]).view(np.float32)
    tokens = (1, columns) if token_axis == 3 else (rows, 1)
    return codes.astype(np.float32) * scales.reshape(p, kv, *tokens)


def make_batch(
    rng: np.random.Generator,
    lengths: list[tuple[int, int]],
    *,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    page_size: int,
    kv_dtype: str,
    group: int = 0,
    num_groups: int = 1,
    window: int | None = None,
) -> Batch:
    """`lengths` holds (new tokens, all tokens) of each sequence; (0, 0) is a padded sequence.

    Everything no token may read is poisoned: page slots after a sequence's end and page 0 hold NaN,
    other groups' block tables point out of range. Entries of pages that a window has passed are 0.
    """
    pages_of = [-(-total // page_size) for _, total in lengths]
    num_pages = sum(pages_of) + 2
    order = 1 + rng.permutation(num_pages - 1)
    tables = np.full((num_groups, len(lengths), max(pages_of) + 1), 10**6, np.int32)
    tables[group] = 0
    slots = np.full((num_groups, max(1, sum(new for new, _ in lengths))), -1, np.int32)
    k_pages = np.full((num_pages, num_kv_heads, head_dim, page_size), np.nan, np.float32)
    v_pages = np.full((num_pages, num_kv_heads, page_size, v_head_dim), np.nan, np.float32)
    keys, values = [], []
    used = row = 0
    for s, (new, total) in enumerate(lengths):
        key = rounded(rng.standard_normal((total, num_kv_heads, head_dim)), kv_dtype)
        value = rounded(rng.standard_normal((total, num_kv_heads, v_head_dim)), kv_dtype)
        keys.append(key.astype(np.float64))
        values.append(value.astype(np.float64))
        first_seen = 0 if window is None else max(0, total - new - window + 1)
        for b in range(pages_of[s]):
            if (b + 1) * page_size <= first_seen:
                continue
            page = order[used]
            used += 1
            tables[group, s, b] = page
            tokens = slice(b * page_size, min(total, (b + 1) * page_size))
            count = tokens.stop - tokens.start
            k_pages[page, :, :, :count] = key[tokens].transpose(1, 2, 0)
            v_pages[page, :, :count] = value[tokens].transpose(1, 0, 2)
        for position in range(total - new, total):
            page = tables[group, s, position // page_size]
            slots[group, row] = page * page_size + position % page_size
            row += 1
    starts = np.concatenate([[0], np.cumsum([new for new, _ in lengths])]).astype(np.int32)
    return Batch(
        q_starts=starts,
        kv_lens=np.array([total for _, total in lengths], np.int32),
        block_tables=tables,
        slots=slots,
        k_pages=packed(k_pages, kv_dtype, token_axis=3),
        v_pages=packed(v_pages, kv_dtype, token_axis=2),
        keys=keys,
        values=values,
    )


def attention(
    q: Array,
    batch: Batch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attention of q `[1, T, H, D]` in float64; `[1, T, H, Dv]`."""
    num_heads = q.shape[2]
    out = np.zeros((1, q.shape[1], num_heads, batch.values[0].shape[-1]))
    for s, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
        start, stop = batch.q_starts[s : s + 2]
        repeat = num_heads // key.shape[1]
        for row in range(start, stop):
            position = len(key) - (stop - row)
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            k = np.repeat(key[seen], repeat, axis=1)
            v = np.repeat(value[seen], repeat, axis=1)
            scores = np.einsum("hd,jhd->hj", q[0, row].astype(np.float64), k) * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            logits = scores if sinks is None else np.concatenate([scores, sinks[:, None]], axis=1)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[0, row] = np.einsum("hj,jhd->hd", weights[:, : scores.shape[1]], v)
    return out

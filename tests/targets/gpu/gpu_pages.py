"""K/V pages between the matrices of the CPU tests' ragged batches and the GPU's layout."""

import ml_dtypes
import numpy as np
from paged_reference import unpacked

from llmc.targets.gpu.kernels.kv_pages import key_shape, kv_type, value_shape


def matrices(batch, kv_dtype, d, dv, n):
    """Keys and values `[P, Kv, N, features]` float32 of a batch of paged_reference.make_batch."""
    keys = unpacked(batch.k_pages, kv_dtype, (d, n), token_axis=3).swapaxes(2, 3)
    return keys, unpacked(batch.v_pages, kv_dtype, (n, dv), token_axis=2)


def packed(shape, x):
    """`[P, Kv, N, features]` (numbers that the type can hold) as the kernels read them.

    Padding of keys is zero; in int8, slots of NaN get a scale of NaN.
    """
    p, kv, n, features = x.shape
    scales = np.zeros((p, kv, n, 0))
    dtype = shape.kv.dtype
    if dtype == "int8":
        scales = np.abs(x).max(axis=3, keepdims=True) / np.float32(127)
        x = np.nan_to_num(np.round(x / np.where(scales == 0, 1, scales)), nan=99)
    wide = np.zeros((p, kv, n, shape.padded), x.dtype)
    wide[..., :features] = x
    lanes = wide.reshape(p, kv, n, -1, shape.vector).swapaxes(2, 3).reshape(p, kv, -1)
    if dtype == "uint16":
        return lanes.astype(ml_dtypes.bfloat16).view(np.uint16)
    if dtype != "int8":
        return lanes.astype(dtype)
    scales = np.ascontiguousarray(scales.astype(np.float32)).reshape(p, kv, -1).view(np.int8)
    return np.concatenate([lanes.astype(np.int8), scales], axis=2)


def unpack(shape, pages):
    """The float32 `[P, Kv, N, padded features]` that the kernels' pages hold."""
    p, kv = pages.shape[:2]
    n = shape.page_size
    numbers = pages[..., : shape.numbers].reshape(p, kv, -1, n, shape.vector)
    x = np.ascontiguousarray(numbers.swapaxes(2, 3)).reshape(p, kv, n, shape.padded)
    if shape.kv.dtype == "uint16":
        return x.view(ml_dtypes.bfloat16).astype(np.float32)
    if shape.kv.dtype != "int8":
        return x.astype(np.float32)
    scales = np.ascontiguousarray(pages[..., shape.numbers :]).view(np.float32)
    return x.astype(np.float32) * scales[..., None]


def page_shapes(kv_dtype, d, dv, n):
    """The layouts of keys and values."""
    kv = kv_type(kv_dtype)
    return key_shape(kv, d, n), value_shape(kv, dv, n)

"""Numbers and texts of a module of kernels, little-endian; `plugin/reader.h` reads them."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def u32(*values: int) -> bytes:
    """Unsigned numbers of 32 bits."""
    return struct.pack(f"<{len(values)}I", *values)


def string(data: bytes) -> bytes:
    """A length and as many bytes."""
    return u32(len(data)) + data


def strings(texts: Sequence[str]) -> bytes:
    """A count and as many texts."""
    return u32(len(texts)) + b"".join(string(t.encode()) for t in texts)

"""Where the buffers of a kernel lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Storage:
    """Where a buffer lies: a parameter's memory, shared memory or an array of the thread."""

    name: str
    dtype: str  # of an element, as the IR has it
    is_global: bool
    is_shared: bool = False
    is_written: bool = False
    is_vectors: bool = False  # an array of vectors of four, whatever is stored alone

    @property
    def can_be_vectors(self) -> bool:
        """Whether the array may be declared so: shared memory of 32-bit elements."""
        return self.is_shared and self.dtype in ("float32", "int32", "uint32")

"""Copies between host and device that the host does not wait for.

A step's inputs are a dozen short arrays, its output a few tokens: copied one by one, and waited
for, they keep a GPU idle for longer than a small model's layer takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.runtime import tvm_runtime
from llmc.runtime.devices.device import Array

Check = Callable[..., None]
"""Calls a function of CUDA's runtime by its name; raises LlmcError where it fails."""

_TO_DEVICE, _TO_HOST, _WITHIN = 1, 2, 3  # cudaMemcpyKind
_NO_TIMING = 2  # cudaEventDisableTiming
_SLOTS = 4  # what the host may be ahead of the device by, and more
_ALIGNMENT = 256  # bytes
_MAX_TENSORS = 4096


class CudaTransfers:
    """Implements Transfers: through memory that stays, in the order of the steps."""

    def __init__(self, check: Check, device: Any) -> None:  # noqa: ANN401 - of tvm_ffi's
        self._check, self._device = check, device
        self.generation = 0
        self._up, self._down = (_Slots(check) for _ in range(2))
        self._memory: Any = None  # of the device
        self._tensors: dict[tuple[int, tuple[int, ...], str], Any] = {}
        self._events = [ctypes.c_void_p() for _ in range(_SLOTS)]
        for event in self._events:
            check("cudaEventCreateWithFlags", ctypes.byref(event), _NO_TIMING)

    def to_device(self, arrays: Sequence[Array]) -> list[Any]:
        """The arrays as tensors of the device; valid until the next call's are computed with."""
        starts = np.cumsum([0, *(-(-a.nbytes // _ALIGNMENT) * _ALIGNMENT for a in arrays)]).tolist()
        if self._up.reserve(starts[-1]):
            self._tensors.clear()
            self._memory = tvm_runtime.empty((self._up.capacity,), "uint8", self._device)
            self.generation += 1
        host = self._up.take()
        for start, array in zip(starts, arrays, strict=False):
            host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._copy(self._memory.data_ptr(), host.ctypes.data, starts[-1], _TO_DEVICE)
        return [
            self._tensor(s, a.shape, str(a.dtype)) for s, a in zip(starts, arrays, strict=False)
        ]

    def within(self, to: int, source: int, num_bytes: int) -> None:
        """Copies from one address of the device to another."""
        self._copy(to, source, num_bytes, _WITHIN)

    def to_host(self, tensor: Any) -> Callable[[], npt.NDArray[Any]]:  # noqa: ANN401
        """Copies a tensor once it is computed; what is returned waits for that."""
        dtype, shape = np.dtype(str(tensor.dtype)), tuple(tensor.shape)
        num_bytes = dtype.itemsize * int(np.prod(shape))
        self._down.reserve(num_bytes)
        host = self._down.take()
        event = self._events[self._down.number]
        self._copy(host.ctypes.data, tensor.data_ptr(), num_bytes, _TO_HOST)
        self._check("cudaEventRecord", event, None)

        def wait() -> npt.NDArray[Any]:
            self._check("cudaEventSynchronize", event)
            return host[:num_bytes].view(dtype).reshape(shape).copy()

        return wait

    def _tensor(self, start: int, shape: tuple[int, ...], dtype: str) -> Any:  # noqa: ANN401
        key = start, shape, dtype
        if key not in self._tensors:
            if len(self._tensors) == _MAX_TENSORS:
                self._tensors.clear()
            address = self._memory.data_ptr() + start
            self._tensors[key] = tvm_runtime.tensor_at(address, shape, dtype, self._device)
        return self._tensors[key]

    def _copy(self, to: int, source: int, num_bytes: int, kind: int) -> None:
        pointers = ctypes.c_void_p(to), ctypes.c_void_p(source)
        self._check("cudaMemcpyAsync", *pointers, ctypes.c_size_t(num_bytes), kind, None)


class _Slots:
    """Pinned memory of the host in several pieces, used in turns."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self.capacity = 0  # bytes of a piece
        self.number = 0  # of the piece taken last
        self._pieces: npt.NDArray[np.uint8] = np.empty((_SLOTS, 0), np.uint8)

    def reserve(self, num_bytes: int) -> bool:
        """Makes the pieces as long where they are not; whether they were not.

        Pieces that were taken stay what they are: copies may be under way.
        """
        if num_bytes <= self.capacity:
            return False
        self.capacity = 2 * num_bytes  # block tables grow step by step
        memory = ctypes.c_void_p()
        size = ctypes.c_size_t(_SLOTS * self.capacity)
        self._check("cudaHostAlloc", ctypes.byref(memory), size, 0)
        assert memory.value is not None
        raw = (ctypes.c_uint8 * (_SLOTS * self.capacity)).from_address(memory.value)
        self._pieces = np.ctypeslib.as_array(raw).reshape(_SLOTS, -1)
        return True

    def take(self) -> npt.NDArray[np.uint8]:
        """The next piece, whose last use is _SLOTS steps ago."""
        self.number = (self.number + 1) % _SLOTS
        piece: npt.NDArray[np.uint8] = self._pieces[self.number]
        return piece

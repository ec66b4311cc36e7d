"""A step's inputs where the device reads them, in memory that is kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmc.runtime import tvm_runtime
from llmc.runtime.devices.device import Array

_MAX_SHAPES = 256  # that are kept: prompts of any length come


class HostInputs:
    """Tensors in the host's memory for inputs of shapes that were there before.

    Making a tensor takes ten times as long as copying a decode's inputs.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[int, ...]], tuple[Array, Any]] = {}

    def copy(self, arrays: Sequence[Array]) -> list[Any]:
        """The arrays as tensors; valid until the next call."""
        return [self._copy(number, array) for number, array in enumerate(arrays)]

    def _copy(self, number: int, array: Array) -> Any:  # noqa: ANN401 - a tensor
        key = number, array.shape
        kept = self._kept.get(key)
        if kept is None:
            if len(self._kept) == _MAX_SHAPES:
                self._kept.clear()
            memory = tvm_runtime.aligned_copy(array)
            kept = self._kept[key] = memory, tvm_runtime.from_numpy(memory)
        np.copyto(kept[0], array)
        return kept[1]


class DeviceInputs:
    """Memory of the device for each input of a step, which has the same type in every step.

    Allocating it anew would take longer than the kernels of a small model. Not one piece for all:
    kernels take no tensor that begins inside another.
    """

    def __init__(self, device: Any) -> None:  # noqa: ANN401 - a device of tvm_ffi's
        self._device = device
        self.generation = 0  # changes where inputs move, as longer ones come
        self._memory: dict[int, tuple[int, Any]] = {}  # by position: elements, tensor

    def copy(self, arrays: Sequence[Array]) -> list[Any]:
        """The arrays as tensors of the device; valid until the next call."""
        return [self._copy(number, array) for number, array in enumerate(arrays)]

    def _copy(self, number: int, array: Array) -> Any:  # noqa: ANN401 - a tensor
        capacity, memory = self._memory.get(number, (-1, None))
        if array.size > capacity:
            capacity = 2 * array.size  # block tables grow step by step
            memory = tvm_runtime.empty((max(capacity, 1),), str(array.dtype), self._device)
            self._memory[number] = capacity, memory
            self.generation += 1
        tensor = tvm_runtime.view(memory, array.shape)
        tvm_runtime.copy_into(tensor, array)
        return tensor

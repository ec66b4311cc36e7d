"""What the runtime asks of a kind of device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmc.errors import LlmcError

Array = npt.NDArray[np.int32] | npt.NDArray[np.float32]


class Transfers(Protocol):
    """Copies that the host does not wait for, in the order of what the device does."""

    generation: int
    """Changes where tensors of `to_device` move."""

    def to_device(self, arrays: Sequence[Array]) -> list[Any]:
        """The arrays as tensors of the device; valid until the next call's are computed with."""

    def within(self, to: int, source: int, num_bytes: int) -> None:
        """Copies from one address of the device to another."""

    def to_host(self, tensor: Any) -> Callable[[], npt.NDArray[Any]]:  # noqa: ANN401
        """Copies a tensor once it is computed; what is returned waits for that."""


class Graphs(Protocol):
    """Steps recorded once and launched as a whole."""

    transfers: Transfers

    def run(self, key: Hashable, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - call's
        """What `call` returns; calls of one key have to use the same memory."""


class Device(Protocol):
    """A kind of device; `index` counts those of the kind on this machine, from 0."""

    tvm_name: str
    is_host: bool  # computes in the host's memory: nothing is copied

    def default_index(self) -> int:
        """The device to use where none is named; raises UsageError."""

    def prepare(self, index: int) -> None:
        """Loads what TVM needs for the device; raises UsageError or ArtifactError without it."""

    def features(self, index: int) -> frozenset[str]:
        """What variants of artifacts may require; asked after `prepare`."""

    def withheld(self, index: int) -> frozenset[str]:
        """What the device has and this process may not use."""

    def available_bytes(self, index: int) -> int:
        """Memory this process can still take; asked after `prepare`."""

    def graphs(self, index: int) -> Graphs | None:
        """Recordings of steps, where the device has such; asked after `prepare`."""

    def explain(self, error: Exception) -> LlmcError | None:
        """An error of TVM's as one of llmc's, where it is the device's."""

"""What the runtime asks of a kind of device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

from llmc.errors import LlmcError


class Graphs(Protocol):
    """Steps recorded once and launched as a whole."""

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

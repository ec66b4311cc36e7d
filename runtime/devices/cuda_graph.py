"""CUDA graphs: a step's launches recorded once and launched together.

A step of a small model is hundreds of launches, each of which takes the host longer than the
device. Only steps without prompts are recorded: those of one shape come again and again.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from llmc.errors import LlmcError
from llmc.runtime.devices.cuda_transfers import CudaTransfers
from llmc.runtime.devices.device import Transfers

_MAX_GRAPHS = 64  # the least recently used goes
_NON_BLOCKING = 1  # cudaStreamNonBlocking
_RELAXED = 2  # cudaStreamCaptureModeRelaxed: memory may be allocated meanwhile


class CudaGraphs:
    """Recorded calls by key; calls of one key have to use the same memory."""

    def __init__(
        self,
        cudart: Any,  # noqa: ANN401
        set_stream: Callable[[int], None],
        device: Any,  # noqa: ANN401
    ) -> None:
        """`cudart` is the CUDA runtime's library, `set_stream` chooses the stream TVM launches
        into (0: the default one), `device` is tvm_ffi's.
        """
        self._cudart, self._set_stream = cudart, set_stream
        self._stream = ctypes.c_void_p()
        self._check("cudaStreamCreateWithFlags", ctypes.byref(self._stream), _NON_BLOCKING)
        self._graphs: OrderedDict[Hashable, tuple[ctypes.c_void_p, Any]] = OrderedDict()
        self._called: set[Hashable] = set()
        self.transfers: Transfers = CudaTransfers(self._check, device)

    def run(self, key: Hashable, call: Callable[[], Any]) -> Any:  # noqa: ANN401 - call's
        """What `call` returns: called the first time, recorded the second, launched from then on.

        The first call loads code and allocates memory, which no recording may contain. The result
        is the same tensor each time, with the latest contents.
        """
        found = self._graphs.get(key)
        if found is None:
            if key not in self._called:
                self._called.add(key)
                return call()
            found = self._record(call)
            self._graphs[key] = found
            if len(self._graphs) > _MAX_GRAPHS:
                old, (graph, _) = self._graphs.popitem(last=False)
                self._called.discard(old)
                self._check("cudaGraphExecDestroy", graph)
        self._graphs.move_to_end(key)
        graph, result = found
        self._check("cudaGraphLaunch", graph, None)
        return result

    def _record(self, call: Callable[[], Any]) -> tuple[ctypes.c_void_p, Any]:
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cudaStreamBeginCapture", self._stream, _RELAXED)
        self._set_stream(self._stream.value or 0)
        try:
            result = call()
        finally:
            self._set_stream(0)
            code = self._cudart.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
        self._raise("cudaStreamEndCapture", code)
        self._check("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._check("cudaGraphDestroy", graph)
        return executable, result

    def _check(self, name: str, *arguments: object) -> None:
        self._raise(name, getattr(self._cudart, name)(*arguments))

    def _raise(self, name: str, code: int) -> None:
        if code:
            self._cudart.cudaGetErrorName.restype = ctypes.c_char_p
            said = self._cudart.cudaGetErrorName(code)
            raise LlmcError(f"CUDA: {name}: {said.decode() if said else code}")

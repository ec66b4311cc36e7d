"""Runs a compiled model's steps through TVM's Relax VM; owns weights and cache tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.artifact import Manifest
from llmc.errors import ArtifactError, LlmcError
from llmc.runtime import tvm_runtime
from llmc.runtime.device_inputs import DeviceInputs
from llmc.runtime.devices import Place
from llmc.runtime.devices.cpu import num_threads
from llmc.runtime.devices.device import Device
from llmc.runtime.step import Float32, Int32, StepInputs
from llmc.runtime.weights import load_weights, random_tensors

_BLOCKS = 32  # what recorded steps have block tables in multiples of


def load_executor(
    directory: Path,
    manifest: Manifest,
    *,
    num_pages: list[int],
    place: Place,
    random_weights: bool = False,
) -> Executor:
    """Loads the artifact's variant for `place` with pools of `num_pages` pages a group.

    Raises ArtifactError where the library does not load, and CapacityError where the device has
    less memory than it said.
    """
    with _explained(place.device):
        return Executor(directory, manifest, num_pages, place, random_weights)


@contextmanager
def _explained(device: Device) -> Iterator[None]:
    """Turns the device's own errors into llmc's."""
    try:
        yield
    except LlmcError:
        raise
    except Exception as exc:
        explained = device.explain(exc)
        if explained is None:
            raise
        raise explained from exc


def _padded(block_tables: Int32) -> Int32:
    """As many blocks as a recording is good for: a table grows by one every page."""
    groups, sequences, blocks = block_tables.shape
    padded = np.zeros((groups, sequences, -(-blocks // _BLOCKS) * _BLOCKS), np.int32)
    padded[:, :, :blocks] = block_tables
    return padded


class Executor:
    """Implements StepExecutor."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        num_pages: list[int],
        place: Place,
        random_weights: bool,
    ) -> None:
        ffi = tvm_runtime.tvm_ffi()
        library = place.variant.library
        self._place = place
        self._device = ffi.device(place.device.tvm_name, place.index)
        try:
            vm = tvm_runtime.load_vm(directory / library, self._device, num_threads=num_threads())
            self._entries = [(e.max_tokens, vm[e.name]) for e in manifest.entry_points]
        except (RuntimeError, AttributeError, OSError, ValueError) as exc:
            raise place.device.explain(exc) or ArtifactError(
                f"{library} does not load: {str(exc)[-300:]}",
                hint="compile the model again with this version of llmc",
            ) from exc
        caches = [
            tvm_runtime.empty((num_pages[c.group], *c.page_shape), c.dtype, self._device)
            for c in manifest.caches
        ]
        self._inputs = DeviceInputs(self._device)
        self._graphs = place.device.graphs(place.index)
        self._instrumented = False
        self._vm = vm
        self._shape = ffi.Shape
        self.caches = caches
        self.weights = (
            random_tensors(manifest, self._tensor)
            if random_weights
            else load_weights(directory, manifest, self._tensor)
        )
        self._state = [*caches, *self.weights]

    def _tensor(self, array: npt.NDArray[Any]) -> Any:  # noqa: ANN401 - a tensor of TVM's
        """The array as the device takes it: in place on the host, else copied."""
        if self._place.device.is_host:
            return tvm_runtime.from_numpy(array)
        return tvm_runtime.copy_to(array, self._device)

    def step(self, inputs: StepInputs) -> Float32:
        """Runs the entry point for this number of tokens; logits `[L, V]` float32."""
        with _explained(self._place.device):
            return self._step(inputs)

    def _step(self, inputs: StepInputs) -> Float32:
        num_tokens = len(inputs.input_ids)
        run = next(run for max_tokens, run in self._entries if num_tokens <= max_tokens)
        records = self._graphs is not None and inputs.max_q_len == 1 and not self._instrumented
        block_tables = _padded(inputs.block_tables) if records else inputs.block_tables
        arrays = (
            inputs.input_ids,
            inputs.positions,
            inputs.q_starts,
            inputs.kv_lens,
            block_tables,
            inputs.slots,
            inputs.state_slots,
            inputs.logits_rows,
        )
        is_host = self._place.device.is_host
        tensors = map(tvm_runtime.from_numpy, arrays) if is_host else self._inputs.copy(arrays)
        arguments = [
            *tensors,
            self._shape([inputs.num_decodes, inputs.max_q_len, inputs.max_kv_len]),
            *self._state,
        ]
        if self._graphs is not None and records:
            key = (*(array.shape for array in arrays), self._inputs.generation)
            logits = self._graphs.run(key, lambda: run(*arguments))
        else:
            logits = run(*arguments)
        if not is_host:
            return tvm_runtime.copy_from(logits)
        result: Float32 = np.asarray(np.from_dlpack(logits), np.float32)  # a view
        return result

    def instrument(self, callback: Callable[..., int] | None) -> None:
        """Has `callback(function, name, before, result, *arguments)` called before and after every
        call that a step makes, kernels and the VM's own (`vm.builtin.…`); None ends it.

        It returns 0; an exception in it ends the step with that exception.
        """
        self._instrumented = callback is not None
        instrument = callback
        if callback is not None and not self._place.device.is_host:
            device = self._device

            def instrument(*arguments: Any) -> int:  # noqa: ANN401 - whatever the VM passes
                tvm_runtime.wait_for(device)  # a call returns before the device has done it
                return callback(*arguments)

        self._vm["set_instrument"](instrument)

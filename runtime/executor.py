"""Runs a compiled model's steps through TVM's Relax VM; owns weights and cache tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.artifact import Manifest
from llmc.errors import ArtifactError, LlmcError
from llmc.runtime import tvm_runtime
from llmc.runtime.device_inputs import DeviceInputs, HostInputs
from llmc.runtime.devices import Place
from llmc.runtime.devices.cpu import num_threads
from llmc.runtime.devices.device import Device
from llmc.runtime.step import BeginStep, Draws, Float32, Int32, StepInputs, StepOutput
from llmc.runtime.weights import MakeTensor

_NUM_INPUTS = 8  # tensors that every step begins with
_BLOCKS = 32  # what recorded steps have block tables in multiples of


def load_executor(
    directory: Path,
    manifest: Manifest,
    *,
    num_pages: list[int],
    place: Place,
    weights: Callable[[MakeTensor], list[Any]],
) -> Executor:
    """Loads the artifact's variant for `place` with pools of `num_pages` pages a group.

    `weights` gives the weights in argument order, each made by the function that it is given.
    Raises ArtifactError where the library does not load, and CapacityError where the device has
    less memory than it said.
    """
    with _explained(place.device):
        return Executor(directory, manifest, num_pages, place, weights)


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


@dataclass(slots=True, kw_only=True)
class _Begun:
    """A step that the device may still be at."""

    num_rows: int
    draws: Draws
    logits: Any
    chosen: Any
    read: Callable[[], npt.NDArray[Any]]
    followed: bool = False  # by a step that takes its tokens


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
        weights: Callable[[MakeTensor], list[Any]],
    ) -> None:
        ffi = tvm_runtime.tvm_ffi()
        library = place.variant.library
        self._place = place
        self._device = ffi.device(place.device.tvm_name, place.index)
        try:
            vm = tvm_runtime.load_vm(directory / library, self._device, num_threads=num_threads())
            self._entries = [(e.max_tokens, vm[e.name]) for e in manifest.entry_points]
            self.chooses = manifest.sampling is not None
        except (RuntimeError, AttributeError, OSError, ValueError) as exc:
            raise place.device.explain(exc) or ArtifactError(
                f"{library} does not load: {str(exc)[-300:]}",
                hint="compile the model again with this version of llmc",
            ) from exc
        caches = [
            tvm_runtime.empty((num_pages[c.group], *c.page_shape), c.dtype, self._device)
            for c in manifest.caches
        ]
        self._graphs = place.device.graphs(place.index)
        self._inputs: HostInputs | DeviceInputs | None = None
        if place.device.is_host:
            self._inputs = HostInputs()
        elif self._graphs is None:
            self._inputs = DeviceInputs(self._device)
        can_begin = self.chooses and self._graphs is not None
        self.begin: BeginStep | None = self._begin_ahead if can_begin else None
        self._last: _Begun | None = None
        self._instrumented = False
        self._vm = vm
        self._function = cache(vm.__getitem__)
        self._shape = ffi.Shape
        self.caches = caches
        self.weights = weights(self._tensor)
        self._state = [*caches, *self.weights]

    def _tensor(self, array: npt.NDArray[Any]) -> Any:  # noqa: ANN401 - a tensor of TVM's
        """The array as the device takes it: in place on the host, else copied."""
        if self._place.device.is_host:
            return tvm_runtime.from_numpy(array)
        return tvm_runtime.copy_to(array, self._device)

    def _contents(self, tensor: Any) -> npt.NDArray[Any]:  # noqa: ANN401 - a tensor of TVM's
        """What a tensor holds once it is computed: a view on the host, else a copy."""
        if self._place.device.is_host:
            return np.from_dlpack(tensor)
        return tvm_runtime.copy_from(tensor)

    def step(self, inputs: StepInputs) -> Float32:
        """Runs the entry point for this number of tokens; logits `[L, V]` float32."""
        with _explained(self._place.device):
            logits, _ = self._launch(inputs, None)
            return self._contents(logits)

    def step_and_choose(self, inputs: StepInputs, draws: Draws) -> StepOutput:
        """Runs the entry point; of the logits only those come to the host that it has to read."""
        with _explained(self._place.device):
            begun = self._begin(inputs, draws, None)
        return self._finish(begun)

    def _begin_ahead(
        self, inputs: StepInputs, draws: Draws, chosen: Int32 | None = None
    ) -> Callable[[], StepOutput]:
        """Implements BeginStep."""
        with _explained(self._place.device):
            before, self._last = self._last, self._begin(inputs, draws, chosen)
        if chosen is not None and before is not None:
            before.followed = True
        return partial(self._finish, self._last)

    def _begin(self, inputs: StepInputs, draws: Draws, sources: Int32 | None) -> _Begun:
        logits, chosen = self._launch(inputs, draws, sources)
        read = (
            partial(self._contents, chosen)
            if self._graphs is None
            else self._graphs.transfers.to_host(chosen)
        )
        return _Begun(
            num_rows=len(inputs.logits_rows), draws=draws, logits=logits, chosen=chosen, read=read
        )

    def _finish(self, step: _Begun) -> StepOutput:
        with _explained(self._place.device):
            token_ids = step.read()
            if len(token_ids) < step.num_rows:
                chosen, token_ids = token_ids, np.full(step.num_rows, -1, np.int32)
                token_ids[step.draws.rows] = chosen
            rest = np.flatnonzero(token_ids < 0)
            if step.followed:  # the next step has overwritten them
                logits = np.full((len(rest), int(step.logits.shape[1])), np.nan, np.float32)
            else:
                logits = tvm_runtime.copy_rows_from(step.logits, rest)
            return StepOutput(token_ids=token_ids, logits=logits)

    def _launch(
        self, inputs: StepInputs, draws: Draws | None, sources: Int32 | None = None
    ) -> tuple[Any, Any]:
        """Logits and chosen tokens as tensors of the device, which may still be at it; `sources`
        are the rows of the last step's chosen tokens that are the input.
        """
        num_tokens = len(inputs.input_ids)
        run = next(run for max_tokens, run in self._entries if num_tokens <= max_tokens)
        graphs = self._graphs if inputs.max_q_len == 1 and not self._instrumented else None
        block_tables = inputs.block_tables if graphs is None else _padded(inputs.block_tables)
        arrays: list[Int32 | Float32] = [
            inputs.input_ids,
            inputs.positions,
            inputs.q_starts,
            inputs.kv_lens,
            block_tables,
            inputs.slots,
            inputs.state_slots,
            inputs.logits_rows,
        ]
        function = None if draws is None else draws.function
        if draws is not None:
            arrays.append(draws.rows)
            if function != "choose_largest":
                arrays += [draws.top_k, draws.settings]
        tensors = self._copied(arrays)
        if sources is not None:
            self._follow(tensors[0], sources)
        arguments = [
            *tensors[:_NUM_INPUTS],
            self._shape([inputs.num_decodes, inputs.max_q_len, inputs.max_kv_len]),
            *self._state,
        ]

        def call() -> tuple[Any, Any]:
            logits = run(*arguments)
            return logits, function and self._function(function)(logits, *tensors[_NUM_INPUTS:])

        if graphs is None:
            return call()
        key = (function, *(array.shape for array in arrays), graphs.transfers.generation)
        result: tuple[Any, Any] = graphs.run(key, call)
        return result

    def _copied(self, arrays: list[Int32 | Float32]) -> list[Any]:
        """The arrays as tensors of the device."""
        if self._graphs is not None:
            return self._graphs.transfers.to_device(arrays)
        assert self._inputs is not None
        return self._inputs.copy(arrays)

    def _follow(self, input_ids: Any, sources: Int32) -> None:  # noqa: ANN401 - a tensor
        """Has the last step's chosen tokens copied into the input, run by run."""
        assert self._graphs is not None, "only where a step runs ahead"
        assert self._last is not None, "there is a step to follow"
        to, source = input_ids.data_ptr(), self._last.chosen.data_ptr()
        done = 0
        for run in np.split(sources, np.flatnonzero(np.diff(sources) != 1) + 1):
            begin, size = 4 * int(run[0]), 4 * len(run)
            self._graphs.transfers.within(to + done, source + begin, size)
            done += size

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

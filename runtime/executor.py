"""Runs a compiled model's steps through TVM's Relax VM; owns weights and cache tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmc.artifact import Manifest
from llmc.errors import ArtifactError
from llmc.runtime import tvm_runtime
from llmc.runtime.devices import DEVICES, choose_variant
from llmc.runtime.devices.cpu import num_threads
from llmc.runtime.step import Float32, StepInputs
from llmc.runtime.weights import load_weights


def load_executor(
    directory: Path, manifest: Manifest, *, num_pages: list[int], device: str = "cpu"
) -> Executor:
    """Loads the artifact's variant for `device` with pools of `num_pages` pages a group.

    Raises ArtifactError where no variant fits this machine or the library does not load.
    """
    variant = choose_variant(manifest, device)
    DEVICES[device].prepare()
    return Executor(
        directory, manifest, variant.library, num_pages, tvm_device=DEVICES[device].tvm_name
    )


class Executor:
    """Implements StepExecutor."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        library: str,
        num_pages: list[int],
        *,
        tvm_device: str,
    ) -> None:
        ffi = tvm_runtime.tvm_ffi()
        device = ffi.device(tvm_device, 0)
        try:
            vm = tvm_runtime.load_vm(directory / library, device, num_threads=num_threads())
            self._entries = [(e.max_tokens, vm[e.name]) for e in manifest.entry_points]
        except (RuntimeError, AttributeError, OSError) as exc:
            raise ArtifactError(
                f"{library} does not load: {str(exc)[-300:]}",
                hint="compile the model again with this version of llmc",
            ) from exc
        caches = [
            tvm_runtime.empty((num_pages[c.group], *c.page_shape), c.dtype, device)
            for c in manifest.caches
        ]
        self._vm = vm
        self._shape = ffi.Shape
        self.caches = caches
        self.weights = load_weights(directory, manifest)
        self._state = [*caches, *self.weights]

    def step(self, inputs: StepInputs) -> Float32:
        """Runs the entry point for this number of tokens; logits `[L, V]` float32."""
        num_tokens = len(inputs.input_ids)
        run = next(run for max_tokens, run in self._entries if num_tokens <= max_tokens)
        tensor = tvm_runtime.from_numpy
        logits = run(
            tensor(inputs.input_ids),
            tensor(inputs.positions),
            tensor(inputs.q_starts),
            tensor(inputs.kv_lens),
            tensor(inputs.block_tables),
            tensor(inputs.slots),
            tensor(inputs.state_slots),
            tensor(inputs.logits_rows),
            self._shape([inputs.num_decodes, inputs.max_q_len, inputs.max_kv_len]),
            *self._state,
        )
        result: Float32 = np.asarray(np.from_dlpack(logits), np.float32)  # a view
        return result

    def instrument(self, callback: Callable[..., int] | None) -> None:
        """Has `callback(function, name, before, result, *arguments)` called before and after every
        call that a step makes, kernels and the VM's own (`vm.builtin.…`); None ends it.

        It returns 0; an exception in it ends the step with that exception.
        """
        self._vm["set_instrument"](callback)

"""transformers' own model of a source, with the weights of one module at a time in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmc.models.parameters import empty_model
from llmc.models.source import ModelSource

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A parameter `[X, …]` whose X matrices can be read one by one: all at once are gigabytes."""

    shape: tuple[int, ...]
    read: Callable[[int], Float32]

    def whole(self) -> Float32:
        """All of them."""
        return np.stack([self.read(index) for index in range(self.shape[0])])


Values = Callable[[str], Float32 | Stack]


class StreamedModel:
    """Runs the reference implementation in float32; a model's size is no limit.

    `values` gives a parameter by name, each time a module that owns it begins to run.
    """

    def __init__(self, source: ModelSource, values: Values) -> None:
        self.model = empty_model(
            source.config, attn_implementation="eager", experts_implementation="eager"
        ).model
        self.loaded: dict[str, torch.Tensor] = {}  # of the modules that run at this moment
        self._values = values
        names: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), name)
        for module in self.model.modules():
            owned = {n: names[id(p)] for n, p in module.named_parameters(recurse=False)}
            if owned:
                self._load_while_running(module, owned)

    def logits(self, ids: npt.NDArray[np.int64], *, last: int | None = None) -> torch.Tensor:
        """Logits `[n, T, V]` float32 of token ids `[n, T]`, or of the `last` positions only."""
        kept = {} if last is None else {"logits_to_keep": last}
        with torch.inference_mode():
            out = self.model(input_ids=torch.from_numpy(ids), use_cache=False, **kept)
            return out.logits.float()

    def _load_while_running(self, module: torch.nn.Module, owned: dict[str, str]) -> None:
        """Gives `module` its parameters for the time of its forward call only."""

        def load(module: torch.nn.Module, _: Sequence[object]) -> None:
            for leaf, name in owned.items():
                value = self._values(name)
                if isinstance(value, Stack):
                    parameter = _StackedTensor(value)
                else:
                    parameter = torch.nn.Parameter(_tensor(value), requires_grad=False)
                module._parameters[leaf] = parameter
                self.loaded[name] = parameter

        def free(module: torch.nn.Module, _: Sequence[object], __: object) -> None:
            for leaf, name in owned.items():
                empty = torch.empty(module._parameters[leaf].shape, device="meta")
                module._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
                del self.loaded[name]

        module.register_forward_pre_hook(load)
        module.register_forward_hook(free)


def _tensor(array: Float32) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class _StackedTensor(torch.Tensor):  # type: ignore[misc] # torch is untyped
    """A stack that reads the matrix which an index asks for, and all of them for anything else."""

    stack: Stack

    @staticmethod
    def __new__(cls: type[_StackedTensor], stack: Stack) -> _StackedTensor:
        tensor: _StackedTensor = torch.Tensor._make_subclass(
            cls, torch.empty(stack.shape, device="meta")
        )
        tensor.stack = stack
        return tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ == "__get__":  # of an attribute, such as the shape
                return func(*args, **(kwargs or {}))
            if func is torch.Tensor.__getitem__ and _is_index(args[1]):
                return _tensor(args[0].stack.read(int(args[1])))
            return func(*map(_whole, args), **{n: _whole(a) for n, a in (kwargs or {}).items()})


def _whole(argument: object) -> object:
    return _tensor(argument.stack.whole()) if isinstance(argument, _StackedTensor) else argument


def _is_index(index: object) -> bool:
    return isinstance(index, int) or (isinstance(index, torch.Tensor) and index.dim() == 0)

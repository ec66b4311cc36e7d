"""transformers' own model of a source, with the weights of one module at a time in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmc.models.parameters import empty_model
from llmc.models.source import ModelSource

Float32 = npt.NDArray[np.float32]


_BLOCK_VALUES = 1 << 22
"""Values of a parameter that are read at a time: memory that is used again costs no page faults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A parameter `[M, K]` or `[X, M, K]` whose rows are read when they are asked for: all at once
    may be gigabytes.
    """

    shape: tuple[int, ...]
    read: Callable[[int, slice], Float32]  # of which matrix (0 of [M, K]), which rows

    def matrix(self, index: int) -> Rows:
        """One of X matrices."""
        return Rows(shape=self.shape[1:], read=lambda _, rows: self.read(index, rows))

    def whole(self) -> Float32:
        """All of them."""
        everything = slice(0, self.shape[-2])
        if len(self.shape) == 2:
            return self.read(0, everything)
        return np.stack([self.read(index, everything) for index in range(self.shape[0])])

    def blocks(self) -> Iterator[slice]:
        """The rows of a matrix, some at a time."""
        m, k = self.shape
        step = max(1, _BLOCK_VALUES // k)
        return (slice(start, min(m, start + step)) for start in range(0, m, step))


Values = Callable[[str], Float32 | Rows]


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
                if isinstance(value, Rows):
                    parameter = _RowsTensor(value)
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


class _RowsTensor(torch.Tensor):  # type: ignore[misc] # torch is untyped
    """A parameter that reads what products, look-ups and indices ask for, and all of it for
    anything else.
    """

    rows: Rows

    @staticmethod
    def __new__(cls: type[_RowsTensor], rows: Rows) -> _RowsTensor:
        tensor: _RowsTensor = torch.Tensor._make_subclass(
            cls, torch.empty(rows.shape, device="meta")
        )
        tensor.rows = rows
        return tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ == "__get__" or func in _OF_SHAPE:
                return func(*args, **kwargs)
            if func is torch.Tensor.__getitem__ and args[0].dim() == 3 and _is_index(args[1]):
                return _RowsTensor(args[0].rows.matrix(int(args[1])))
            if func is torch.nn.functional.linear and _reads_matrix(args):
                return _linear(*args, **kwargs)
            if func is torch.nn.functional.embedding and _reads_matrix(args):
                return _embedding(*args, **kwargs)
            return func(*map(_whole, args), **{n: _whole(a) for n, a in kwargs.items()})


_OF_SHAPE = (torch.Tensor.dim, torch.Tensor.size, torch.Tensor.numel)


def _linear(x: torch.Tensor, weight: _RowsTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x · weightᵀ + bias`, some outputs at a time."""
    out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    for rows in weight.rows.blocks():
        out[..., rows] = torch.nn.functional.linear(x, _tensor(weight.rows.read(0, rows)))
    return out if bias is None else out + _whole(bias)


def _embedding(
    ids: torch.Tensor,
    weight: _RowsTensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    **others: Any,  # noqa: ANN401 - that training alone asks for
) -> torch.Tensor:
    """The rows of token ids, each read once; the padding's matters to training alone."""
    if max_norm is not None:
        return torch.nn.functional.embedding(ids, _whole(weight), None, max_norm, **others)
    wanted, places = torch.unique(ids, return_inverse=True)
    rows = [weight.rows.read(0, slice(i, i + 1)) for i in wanted.tolist()]
    return _tensor(np.concatenate(rows))[places]


def _whole(argument: object) -> object:
    return _tensor(argument.rows.whole()) if isinstance(argument, _RowsTensor) else argument


def _reads_matrix(args: Sequence[object]) -> bool:
    """Whether a function's second argument is rows of a matrix."""
    return len(args) > 1 and isinstance(args[1], _RowsTensor) and args[1].dim() == 2


def _is_index(index: object) -> bool:
    return isinstance(index, int) or (isinstance(index, torch.Tensor) and index.dim() == 0)

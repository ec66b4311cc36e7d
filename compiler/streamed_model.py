"""transformers' own model of a source, with the weights of one module at a time in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from llmc.models.parameters import empty_model
from llmc.models.source import ModelSource

Values = Callable[[str], npt.NDArray[np.float32]]


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
                array = np.ascontiguousarray(self._values(name))
                array = array if array.flags.writeable else array.copy()
                parameter = torch.nn.Parameter(torch.from_numpy(array), requires_grad=False)
                module._parameters[leaf] = parameter
                self.loaded[name] = parameter

        def free(module: torch.nn.Module, _: Sequence[object], __: object) -> None:
            for leaf, name in owned.items():
                empty = torch.empty_like(module._parameters[leaf], device="meta")
                module._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
                del self.loaded[name]

        module.register_forward_pre_hook(load)
        module.register_forward_hook(free)

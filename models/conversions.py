"""How checkpoint tensors become model parameters: transformers' own renamings and conversions.

A checkpoint may name, split or merge tensors otherwise than the model does (a mixture of experts
stored one expert a tensor, say). transformers describes this as `WeightRenaming`s and
`WeightConverter`s. Here they become recipes that are run one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from llmc.errors import ImportModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Makes parameters from checkpoint tensors; several parameters where a tensor is split."""

    target: str  # the first parameter it makes
    converter: WeightConverter | None  # None: the checkpoint's tensor as it is
    model: Any  # some conversions look up shapes and config values
    sources: list[tuple[str, str]] = field(default_factory=list)  # (source pattern, checkpoint key)

    @property
    def keys(self) -> list[str]:
        """The checkpoint tensors it reads."""
        return [key for _, key in self.sources]

    def run(self, load: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameter name -> value, from the checkpoint's tensors as `load` gives them.

        Raises ImportModelError where they do not fit together.
        """
        if self.converter is None:
            return {self.target: load(self.keys[0])}
        converter = deepcopy(self.converter)  # it collects tensors while it runs
        for pattern, key in self.sources:
            converter.add_tensor(self.target, key, pattern, load(key))
        try:
            made = converter.convert(self.target, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as exc:
            raise ImportModelError(
                f"{self.target}: cannot be made from {self.keys[0]} and {len(self.keys) - 1} more"
                f" tensors: {str(exc)[:200]}",
                hint="the checkpoint is damaged or incomplete: download it again",
            ) from exc
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def outline(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, without reading anything."""
        made = self.run(lambda key: torch.empty(shapes[key], device="meta"))
        return {name: tuple(value.shape) for name, value in made.items()}


def recipes(keys: Iterable[str], transforms: list[Any], model: Any) -> list[Recipe]:  # noqa: ANN401
    """One recipe for each group of checkpoint `keys` that feeds parameters of `model`.

    Follows the order of `convert_and_load_state_dict_in_model` in transformers; keys the model does
    not know are left out.
    """
    state = model.state_dict()
    prefix = model.base_model_prefix
    transforms = deepcopy(transforms)  # matching marks them as used, and arms some
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    made: dict[str, Recipe] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            continue
        if name not in made:
            converter = None if pattern is None else by_pattern[pattern]
            made[name] = Recipe(target=name, converter=converter, model=model)
        made[name].sources.append((pattern or key, key))
    return list(made.values())

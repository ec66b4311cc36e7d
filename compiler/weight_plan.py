"""The weight plan: which tensors of the model each argument of the compiled function is made from.

Passes change the plan together with the function: they choose formats, concatenate siblings and
pack for the kernels. It travels as an attribute of the IRModule, so that a pass stays IRModule to
IRModule, and is run one argument at a time when the artifact is written.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import tvm

_ATTRIBUTE = "llmc.weight_plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """One argument: the rows of its sources, one after the other, in `format`.

    transposed: the model stores `[K, M]`; the argument is `[M, K]` (of each expert).
    part: which array of the packed form this argument is; None before packing and if plain.
    """

    sources: list[str]
    format: str = "f32"
    transposed: bool = False
    layout: str = "plain"
    part: int | None = None


Weights = dict[str, WeightSpec]


def attach(mod: tvm.IRModule, weights: Weights) -> tvm.IRModule:
    """The module with `weights` as its plan."""
    plan = {name: dataclasses.asdict(spec) for name, spec in weights.items()}
    return mod.with_attr(_ATTRIBUTE, json.dumps(plan))


def weights_of(mod: tvm.IRModule) -> Weights:
    """The plan of `mod`, by parameter name."""
    plan = json.loads(str(mod.attrs[_ATTRIBUTE]))
    return {name: WeightSpec(**spec) for name, spec in plan.items()}

"""The comparison of GPU kernels with dlight's fallback: both sides compute the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.gpu_kernels import OPERATORS, measure
from llmc.targets.registry import list_targets, open_target


@pytest.fixture(autouse=True)
def device() -> None:
    """Skips where this machine cannot compile for Vulkan and run it."""
    [status] = [s for s in list_targets() if s.name == "vulkan"]
    if not (status.can_build and status.can_run):
        pytest.skip(f"{'; '.join(status.reasons)}: {status.hint}")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("qkv", "gate-up", "down", "attention")]
    + [name for name in OPERATORS if name not in ("qkv", "gate-up", "down", "attention")],
)
@pytest.mark.parametrize("tokens", [1, 19])
def test_both_sides_compute_the_same_operator(name: str, tokens: int) -> None:
    ours, theirs = measure(OPERATORS[name](tokens), open_target("vulkan").tvm_target, repeat=2)
    assert len(ours) == len(theirs) == 2
    assert min(*ours, *theirs) > 0


def test_a_kernel_that_computes_something_else_is_not_measured() -> None:
    case = OPERATORS["norm"](1)
    x, weight = case.inputs
    with pytest.raises(AssertionError, match="RMSNorm, 1 tokens: off by"):
        measure(
            replace(case, inputs=[x, np.zeros_like(weight)]),
            open_target("vulkan").tvm_target,
            repeat=1,
        )

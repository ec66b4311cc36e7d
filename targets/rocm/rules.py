"""What ROCm has in front of the kernels of all GPUs: products by matrix instructions."""

from __future__ import annotations

from collections.abc import Sequence

from llmc import dialect
from llmc.formats import FORMATS
from llmc.targets.base import Kernel, KernelRule, Site
from llmc.targets.gpu.parameters import GpuParameters
from llmc.targets.gpu.rules import expert_tiles, kernel_rules
from llmc.targets.rocm.kernels.linear import ExpertTile, linear_matrix
from llmc.targets.rocm.kernels.matrix import multiplies
from llmc.targets.rocm.parameters import MatrixPlan


def rocm_rules(
    parameters: GpuParameters, plan: MatrixPlan, few_tokens: int
) -> Sequence[tuple[str, KernelRule]]:
    """The rules in the order they are tried; entry points of `few_tokens` keep the shared ones."""

    def matrix(site: Site) -> Kernel | None:
        """None for weights that the instructions would round: those of float32."""
        op = site.op
        if not isinstance(op, dialect.Linear) or not multiplies(FORMATS[op.format or "f32"]):
            return None
        if (site.extents("x")[1] or site.max_tokens) <= few_tokens:
            return None
        m, k = site.extents("weight")
        func = linear_matrix(
            FORMATS[op.format or "f32"],
            m,
            k,
            bias="bias" in site.types,
            residual="residual" in site.types,
            dtype=str(site.types["x"].dtype),
            vector_dtype=str(site.types["bias"].dtype) if "bias" in site.types else "float32",
            plan=plan,
        )
        return Kernel.of(func, site, ("x", "weight", "bias", "residual"))

    def experts(site: Site) -> Kernel | None:
        op = site.op
        if not isinstance(op, dialect.GroupedLinear) or site.max_tokens <= few_tokens:
            return None
        if not multiplies(FORMATS[op.format or "f32"]):
            return None
        return expert_tiles(site, ExpertTile(plan.experts, plan.instruction))

    ours = [("rocm.matrix", matrix), ("rocm.matrix_experts", experts)]
    return [*ours, *kernel_rules(parameters, few_tokens)]

"""What CUDA has in front of the kernels of all GPUs: products on tensor cores."""

from __future__ import annotations

from collections.abc import Sequence

from llmc import dialect
from llmc.formats import FORMATS
from llmc.targets.base import Kernel, KernelRule, Site
from llmc.targets.cuda.kernels.tensor_cores import linear_tensor_cores, multiplies
from llmc.targets.cuda.parameters import PLANS
from llmc.targets.gpu.parameters import GpuParameters
from llmc.targets.gpu.rules import kernel_rules


def cuda_rules(parameters: GpuParameters, few_tokens: int) -> Sequence[tuple[str, KernelRule]]:
    """The rules in the order they are tried; entry points of `few_tokens` keep the shared ones."""

    def tensor_cores(site: Site) -> Kernel | None:
        if not isinstance(site.op, dialect.Linear):
            return None
        if (site.extents("x")[1] or site.max_tokens) <= few_tokens:
            return None
        return _linear(site, site.op)

    return [("cuda.tensor_cores", tensor_cores), *kernel_rules(parameters, few_tokens)]


def _linear(site: Site, op: dialect.Linear) -> Kernel | None:
    """None for weights that tensor cores would round: those of float32."""
    fmt = FORMATS[op.format or "f32"]
    if not multiplies(fmt):
        return None
    m, k = site.extents("weight")
    func = linear_tensor_cores(
        fmt,
        m,
        k,
        bias="bias" in site.types,
        residual="residual" in site.types,
        dtype=str(site.types["x"].dtype),
        vector_dtype=str(site.types["bias"].dtype) if "bias" in site.types else "float32",
        plan=PLANS[fmt.bits],
    )
    return Kernel.of(func, site, ("x", "weight", "bias", "residual"))

"""What CUDA has in front of the kernels of all GPUs: products and attention on tensor cores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llmc import dialect
from llmc.formats import FORMATS
from llmc.targets.base import Kernel, KernelRule, Site
from llmc.targets.cuda.kernels.attention import flash, flash_plan
from llmc.targets.cuda.kernels.tensor_cores import linear_tensor_cores, multiplies
from llmc.targets.cuda.parameters import PLANS
from llmc.targets.gpu.parameters import GpuParameters
from llmc.targets.gpu.rules import attention_kernel, kernel_rules


def cuda_rules(
    parameters: GpuParameters, few_tokens: int, shared_bytes: int
) -> Sequence[tuple[str, KernelRule]]:
    """The rules in the order they are tried; products of `few_tokens` keep the shared ones.

    A block of attention may have `shared_bytes` of shared memory.
    """

    def tensor_cores(site: Site) -> Kernel | None:
        if not isinstance(site.op, dialect.Linear):
            return None
        if (site.extents("x")[1] or site.max_tokens) <= few_tokens:
            return None
        return _linear(site, site.op)

    def attention(site: Site) -> Kernel | None:
        if not isinstance(site.op, dialect.PagedAttention) or site.tokens == 1:
            return None
        head_dim, kv_dtype = site.extents("query")[3], str(site.types["k_pages"].dtype)
        plan = flash_plan(head_dim, site.op.v_head_dim, site.page_size, kv_dtype, shared_bytes)
        if plan is None or site.op.scale <= 0:  # the highest product is the highest score
            return None
        return attention_kernel(site, parameters, partial(flash, plan=plan))

    own = [("cuda.tensor_cores", tensor_cores), ("cuda.attention", attention)]
    return [*own, *kernel_rules(parameters, few_tokens)]


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

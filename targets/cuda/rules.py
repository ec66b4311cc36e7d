"""What CUDA has in front of the kernels of all GPUs: products and attention of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from llmc import dialect
from llmc.formats import FORMATS
from llmc.targets.base import Kernel, KernelRule, Site
from llmc.targets.cuda.kernels import attention_decode, gemv, wide
from llmc.targets.cuda.kernels.attention import flash, flash_plan
from llmc.targets.cuda.kernels.tensor_cores import linear_tensor_cores, multiplies
from llmc.targets.cuda.parameters import PLANS, WIDE_PLANS, DecodePlan
from llmc.targets.gpu.parameters import GpuParameters
from llmc.targets.gpu.rules import attention_kernel, kernel_rules


def cuda_rules(
    parameters: GpuParameters, few_tokens: int, shared_bytes: int, hopper: bool
) -> Sequence[tuple[str, KernelRule]]:
    """The rules in the order they are tried; a block of attention may have `shared_bytes` of shared
    memory. `hopper`: the code is for sm_90 alone.
    """

    def many(site: Site) -> Kernel | None:
        return _wide(site) if hopper and site.max_tokens > few_tokens else None

    def tensor_cores(site: Site) -> Kernel | None:
        return _linear(site, site.op) if isinstance(site.op, dialect.Linear) else None

    def attention(site: Site) -> Kernel | None:
        op = site.op
        if not isinstance(op, dialect.PagedAttention):
            return None
        _, _, heads, head_dim = site.extents("query")
        kv_dtype = str(site.types["k_pages"].dtype)
        plan = None
        if site.tokens != 1 and op.scale > 0:  # the highest product is the highest score
            plan = flash_plan(head_dim, op.v_head_dim, site.page_size, kv_dtype, shared_bytes)
        single = attention_decode.takes(
            heads // site.extents("k_pages")[1], head_dim, op.v_head_dim, site.page_size, kv_dtype
        )
        if plan is None and not single:
            return None
        return attention_kernel(
            site,
            parameters,
            prefill=None if plan is None else partial(flash, plan=plan),
            decode=partial(attention_decode.decode, plan=DecodePlan()) if single else None,
        )

    def single(site: Site) -> Kernel | None:
        return _gemv(site, hopper)

    own = [("cuda.gemv", single), ("cuda.wide", many), ("cuda.tensor_cores", tensor_cores)]
    own.append(("cuda.attention", attention))
    return [*own, *kernel_rules(parameters, few_tokens)]


def _gemv(site: Site, hopper: bool) -> Kernel | None:
    op = site.op
    if not isinstance(op, dialect.Linear | dialect.FusedLinear) or site.extents("x")[1] != 1:
        return None
    fmt = FORMATS[op.format or "f32"]
    m, k = site.extents("weight")
    if site.tokens != 1 or not gemv.takes(fmt, m, k):
        return None
    around = _around(site, op)
    plan = gemv.plan_for(fmt, m, k, gate=around["gate"] is not None, hopper=hopper)
    func = gemv.gemv(fmt, m, k, **around, plan=plan)
    return Kernel.of(func, site, ("x", "norm", "weight", "bias", "residual"))


def _wide(site: Site) -> Kernel | None:
    op = site.op
    if not isinstance(op, dialect.Linear | dialect.FusedLinear) or site.extents("x")[1]:
        return None
    fmt = FORMATS[op.format or "f32"]
    m, k = site.extents("weight")
    around = _around(site, op)
    if not wide.takes(fmt, m, gate=around["gate"] is not None):
        return None
    func = wide.linear_wide(fmt, m, k, **around, plan=WIDE_PLANS[fmt.bits])
    return Kernel.of(func, site, ("x", "norm", "weight", "bias", "residual"))


def _around(site: Site, op: dialect.Linear | dialect.FusedLinear) -> dict[str, Any]:
    """What stands before and behind a product, and of which types."""
    fused = op if isinstance(op, dialect.FusedLinear) else dialect.FusedLinear()
    dtypes = {name: str(ty.dtype) for name, ty in site.types.items()}
    return {
        "norm": (fused.eps, fused.offset) if "norm" in dtypes else None,
        "gate": fused.gate,
        "bias": "bias" in dtypes,
        "residual": "residual" in dtypes,
        "dtype": dtypes["x"],
        "vector_dtype": dtypes.get("bias", "float32"),
        "norm_dtype": dtypes.get("norm", "float32"),
    }


def _linear(site: Site, op: dialect.Linear) -> Kernel | None:
    """None for weights that tensor cores would round: those of float32."""
    fmt = FORMATS[op.format or "f32"]
    if not multiplies(fmt):
        return None
    m, k = site.extents("weight")
    if site.tokens == 1:  # the shared kernels take what the product of one token leaves
        return None
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

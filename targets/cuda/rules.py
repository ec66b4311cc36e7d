"""What CUDA has in front of the kernels of all GPUs: products of one token, and on tensor cores."""

from __future__ import annotations

from collections.abc import Sequence

from llmc import dialect
from llmc.formats import FORMATS
from llmc.targets.base import Kernel, KernelRule, Site
from llmc.targets.cuda.kernels import attention_decode, gemv
from llmc.targets.cuda.kernels.tensor_cores import linear_tensor_cores, multiplies
from llmc.targets.cuda.parameters import PLANS, DecodePlan, gemv_plan
from llmc.targets.gpu.kernels.attention_inputs import Inputs, Shape
from llmc.targets.gpu.parameters import GpuParameters
from llmc.targets.gpu.rules import attention, kernel_rules


def cuda_rules(parameters: GpuParameters, few_tokens: int) -> Sequence[tuple[str, KernelRule]]:
    """The rules in the order they are tried."""

    def tensor_cores(site: Site) -> Kernel | None:
        return _linear(site, site.op) if isinstance(site.op, dialect.Linear) else None

    def attends(site: Site) -> Kernel | None:
        return attention(site, parameters, own_decode=_decode)

    own = [("cuda.gemv", _gemv), ("cuda.tensor_cores", tensor_cores), ("cuda.attention", attends)]
    return [*own, *kernel_rules(parameters, few_tokens)]


def _decode(shape: Shape, inputs: Inputs) -> bool:
    if not attention_decode.takes(shape):
        return False
    attention_decode.decode(shape, inputs, DecodePlan())
    return True


def _gemv(site: Site) -> Kernel | None:
    op = site.op
    if not isinstance(op, dialect.Linear | dialect.FusedLinear) or site.extents("x")[1] != 1:
        return None
    fmt = FORMATS[op.format or "f32"]
    m, k = site.extents("weight")
    if site.tokens != 1 or not gemv.takes(fmt, m, k):
        return None
    fused = op if isinstance(op, dialect.FusedLinear) else dialect.FusedLinear()
    dtypes = {name: str(ty.dtype) for name, ty in site.types.items()}
    func = gemv.gemv(
        fmt,
        m,
        k,
        norm=(fused.eps, fused.offset) if "norm" in dtypes else None,
        gate=fused.gate,
        bias="bias" in dtypes,
        residual="residual" in dtypes,
        dtype=dtypes["x"],
        vector_dtype=dtypes.get("bias", "float32"),
        norm_dtype=dtypes.get("norm", "float32"),
        plan=gemv_plan(k),
    )
    return Kernel.of(func, site, ("x", "norm", "weight", "bias", "residual"))


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

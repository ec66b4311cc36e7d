"""What Vulkan has in front of the kernels of all GPUs: products on cooperative matrices."""

from __future__ import annotations

from collections.abc import Sequence

from llmc import dialect
from llmc.formats import FORMATS
from llmc.targets.base import Kernel, KernelRule, Site
from llmc.targets.gpu.kernels.grouped_tiles import FloatTile
from llmc.targets.gpu.kernels.matrix_tile import MatrixTile, multiply_tile
from llmc.targets.gpu.parameters import GpuParameters
from llmc.targets.gpu.rules import expert_tiles, kernel_rules, linear_tiles
from llmc.targets.vulkan.kernels.cooperative_matrix import multiplies


def vulkan_rules(
    parameters: GpuParameters, tile: MatrixTile | None, few_tokens: int
) -> Sequence[tuple[str, KernelRule]]:
    """The rules in the order they are tried; without a `tile`, those of all GPUs.

    Entry points of `few_tokens` keep the shared kernels, and so do weights that float16 would
    round.
    """
    shared = kernel_rules(parameters, few_tokens)
    if tile is None:
        return shared

    def takes(site: Site) -> bool:
        op = site.op
        if not isinstance(op, dialect.Linear | dialect.GroupedLinear):
            return False
        rows = site.extents("x")[1] if isinstance(op, dialect.Linear) else 0
        return multiplies(FORMATS[op.format or "f32"]) and (rows or site.max_tokens) > few_tokens

    def products(site: Site) -> Kernel | None:
        return linear_tiles(site, tile, multiply_tile) if takes(site) else None

    def experts(site: Site) -> Kernel | None:
        return expert_tiles(site, FloatTile(tile, multiply_tile)) if takes(site) else None

    return [("vulkan.matrix", products), ("vulkan.matrix_experts", experts), *shared]

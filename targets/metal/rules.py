"""What Metal has in front of the kernels of all GPUs: products on simdgroup matrices."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.targets.base import Kernel, KernelRule, Site
from llmc.targets.gpu.kernels.grouped_tiles import FloatTile
from llmc.targets.gpu.kernels.matrix_tile import MatrixTile, multiply_tile
from llmc.targets.gpu.parameters import GpuParameters
from llmc.targets.gpu.rules import expert_tiles, kernel_rules, linear_tiles


def metal_rules(
    parameters: GpuParameters, tile: MatrixTile, few_tokens: int
) -> Sequence[tuple[str, KernelRule]]:
    """The rules in the order they are tried; entry points of `few_tokens` keep the shared ones."""

    def products(site: Site) -> Kernel | None:
        if "x" not in site.types or (site.extents("x")[1] or site.max_tokens) <= few_tokens:
            return None
        return linear_tiles(site, tile, multiply_tile)

    def experts(site: Site) -> Kernel | None:
        if site.max_tokens <= few_tokens:
            return None
        return expert_tiles(site, FloatTile(tile, multiply_tile))

    own: list[tuple[str, KernelRule]] = [
        ("metal.simdgroup", products),
        ("metal.simdgroup_experts", experts),
    ]
    return [*own, *kernel_rules(parameters, few_tokens)]

"""The tunable numbers of products on simdgroup matrices."""

from __future__ import annotations

from llmc.targets.gpu.kernels.matrix_tile import MatrixTile
from llmc.targets.metal.kernels.simdgroup import SimdgroupMatrices

SIMDGROUP = SimdgroupMatrices.subgroup
TILE = MatrixTile(
    unit=SimdgroupMatrices(), rows=64, tokens=32, group_rows=32, group_tokens=16, depth=32
)

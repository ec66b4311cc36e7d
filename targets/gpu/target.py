"""What every GPU target has in common: weight layout, KV pages, sizes."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.formats import WeightFormat
from llmc.targets.base import ActivationBlocks, Array, Matrix, PackedPart, Sampling, Target
from llmc.targets.gpu import layout
from llmc.targets.gpu.layout import PANEL
from llmc.targets.gpu.parameters import GpuParameters
from llmc.targets.gpu.rules import key_page, value_page
from llmc.targets.gpu.sampling import GpuSampling


class GpuTarget:
    """The part of llmc.targets.base.Target that the shared kernels decide."""

    layout = layout.LAYOUT
    panel = PANEL
    page_size = 16
    few_tokens = 8
    lazy_memory = False
    narrow_products: frozenset[str] = frozenset()
    lacking_formats: frozenset[str] = frozenset()
    level = ""
    alternatives: Sequence[Target] = ()
    parameters: GpuParameters

    def sampling(self, vocab_size: int) -> Sampling:
        """On the device: logits of large batches would take longer to copy than to compute."""
        return GpuSampling(vocab_size, self.parameters).build()

    def key_page(self, kv_heads: int, head_dim: int, kv_dtype: str) -> list[int]:
        """`[Kv, elements]`."""
        return key_page(kv_heads, head_dim, kv_dtype, self.page_size)

    def value_page(self, kv_heads: int, head_dim: int, kv_dtype: str) -> list[int]:
        """`[Kv, elements]` likewise."""
        return value_page(kv_heads, head_dim, kv_dtype, self.page_size)

    def activation_blocks(self, fmt: WeightFormat, features: int) -> ActivationBlocks | None:
        """None: products are made in floats."""
        return None

    def fuses(self, fmt: WeightFormat, m: int, k: int, max_tokens: int) -> bool:
        """No."""
        return False

    def packed_parts(self, fmt: WeightFormat, shape: Sequence[int]) -> list[PackedPart]:
        """The arrays of layout chunk32."""
        *experts, m, k = shape
        return layout.packed_parts(fmt, m, k, num_experts=experts[0] if experts else None)

    def pack(self, fmt: WeightFormat, matrix: Matrix) -> list[Array]:
        """In the same order."""
        return layout.pack(fmt, [matrix])

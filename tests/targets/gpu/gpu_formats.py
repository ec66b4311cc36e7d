"""The weight formats that the GPU tests go through."""

from matrices import DISTINCT

from llmc.formats import WeightFormat

# Its chunks need two scales each: no named format does, a user's own may.
SMALL_GROUPS = WeightFormat(name="w4-g16", bits=4, code_bits=4, group=16)
ALL = [*DISTINCT, SMALL_GROUPS]


def features_of(fmt):
    """Input features that end within a chunk, where the format's groups allow it."""
    if fmt.sub_scales is not None:
        return fmt.sub_scales.group
    return {0: 102, 16: 80}.get(fmt.group, 3 * fmt.group)

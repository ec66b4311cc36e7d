"""Products of one token that are compared with float64: on a GPU, and as g++ compiles them."""

import sys
from pathlib import Path

from llmc.targets.cuda.kernels import gemv

sys.path.append(str(Path(__file__).parent.parent / "cpu"))
from matrices import DISTINCT

M = 96
FUSED = [f for f in DISTINCT if gemv.takes(f, M, 96)]
# x keeps 2^-16 of the largest of the features that share a scale, some 2^-15 of the norm; floats
# are multiplied as they are.
TOLERANCE = {False: 1e-4, True: 2e-6}


def features_of(fmt):
    """Input features that end within a superblock of the kernel's."""
    return max(96, 3 * (fmt.sub_scales.group if fmt.sub_scales else fmt.group))

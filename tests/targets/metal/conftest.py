"""No Mac is needed: kernels run on a CPU through shim/, libraries are only read."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
# Matrices, ragged batches and pages with their exact values are the CPU's and the GPUs' tests' own.
sys.path += [str(HERE), str(HERE.parent / "cpu"), str(HERE.parent / "gpu")]

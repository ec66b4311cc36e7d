"""Choosing tokens on CPUs, in one part and in many, at every level that this machine has."""

import pytest
import tvm
from host_library import require_level
from token_choices import (  # noqa: F401 - collected here
    VOCAB,
    Kernels,
    test_a_row_without_a_finite_maximum_is_given_back,
    test_a_rows_token_does_not_depend_on_the_other_rows,
    test_draws_have_the_hosts_distribution,
    test_numbers_at_the_ends_draw_tokens_that_may_be_drawn,
    test_the_largest_is_numpys_ties_included,
)

from llmc.targets.cpu.parameters import SamplingParameters
from llmc.targets.cpu.sampling import CpuSampling
from llmc.targets.cpu.target import CpuTarget

# Parts and blocks that end within the row, the last one of eleven logits.
SMALL = SamplingParameters(part=64, block=32)


@pytest.fixture(scope="module", params=["avx2", "avx512", "avx512-whole"])
def kernels(request):
    level, _, whole = request.param.partition("-")
    require_level(level)
    target = CpuTarget(level)
    sampling = CpuSampling(VOCAB, SamplingParameters() if whole else SMALL).build()
    with tvm.transform.PassContext(**target.pass_options):
        return Kernels(sampling, target.tvm_target, tvm.cpu())

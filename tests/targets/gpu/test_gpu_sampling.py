"""Choosing tokens on GPUs, in one part and in many."""

import pytest
import tvm
from token_choices import (  # noqa: F401 - collected here
    VOCAB,
    Kernels,
    test_a_row_without_a_finite_maximum_is_given_back,
    test_a_rows_token_does_not_depend_on_the_other_rows,
    test_draws_have_the_hosts_distribution,
    test_numbers_at_the_ends_draw_tokens_that_may_be_drawn,
    test_the_largest_is_numpys_ties_included,
)
from vulkan_build import target

from llmc.targets.gpu.parameters import GpuParameters, SamplingParameters
from llmc.targets.gpu.sampling import GpuSampling

# Parts that end within the row, more of them than threads, the last one of three logits.
SMALL = SamplingParameters(
    part=40, argmax_threads=16, merge_threads=8, histogram_threads=8, draw_threads=8
)
WHOLE = GpuParameters()  # the whole row in one part


@pytest.fixture(scope="module", params=["parts", "one_part"])
def kernels(request):
    from llmc.targets.vulkan.build import register

    register()
    params = GpuParameters(sampling=SMALL) if request.param == "parts" else WHOLE
    return Kernels(GpuSampling(VOCAB, params).build(), target(), tvm.device("vulkan", 0))

"""Every field is bounded, and the error names it."""

from __future__ import annotations

import pytest

from llmc.errors import RequestError
from llmc.runtime.sampling_params import SamplingParams

NAN, INF = float("nan"), float("inf")
BAD = {
    "max_tokens": [-1, 1.5, True, "3", 2**31, 10**5000, None, 0],
    "temperature": [-0.1, NAN, INF, -INF, 101, "1", None, True, 10**400, [1]],
    "top_k": [-1, 0.5, 2**31, True],
    "top_p": [0, -0.1, 1.1, NAN, INF, "x"],
    "min_p": [-0.1, 1.1, NAN],
    "seed": [2**64, -(2**63) - 1, 1.0, "a", True],
    "presence_penalty": [-2.1, 2.1, NAN],
    "frequency_penalty": [-2.1, 2.1, NAN],
    "repetition_penalty": [0, -1, 101, NAN, INF],
    "stop": [[""], ["a"] * 17, ["a" * 257], [1], 5, {"a": 10**5000}, b"ab"],
    "stop_token_ids": [[-1], [1.0], ["a"], [1] * 257, 5, "12", [2**31]],
    "ignore_eos": [1, "yes", None],
    "min_tokens": [-1, 129, True],
    "logprobs": [-1, 21, True, 1.0],
    "prompt_logprobs": [-1, 21, True],
    "n": [0, 129, 1.0, True],
    "logit_bias": [{-1: 0}, {1: 101}, {1: NAN}, {"1": 0}, {i: 0 for i in range(1025)}, [1], None],
}


@pytest.mark.parametrize("name", BAD)
def test_a_value_out_of_range_is_refused_by_name(name):
    for value in BAD[name]:
        with pytest.raises(RequestError) as info:
            SamplingParams(**{name: value})
        assert info.value.param == name
        assert len(info.value.message) < 300


def test_the_limits_themselves_are_allowed():
    SamplingParams(
        max_tokens=2**31 - 1,
        temperature=100,
        top_p=1,
        min_p=1,
        seed=2**64 - 1,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=100,
        stop=["a" * 256] * 16,
        stop_token_ids=range(256),
        min_tokens=5,
        logprobs=20,
        prompt_logprobs=0,
        n=128,
        logit_bias={i: -100 for i in range(1024)},
    )
    SamplingParams(max_tokens=0, prompt_logprobs=1)


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="END").stop == ("END",)


def test_later_changes_of_the_callers_lists_do_not_get_in():
    stops, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stops, logit_bias=bias)
    stops.append("")
    bias[2] = 1e9
    assert params.stop == ("a",)
    assert params.logit_bias == {1: 2.0}

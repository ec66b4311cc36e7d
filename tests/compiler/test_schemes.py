import pytest

from llmc.compiler.schemes import KV_DTYPES, SCHEMES, scheme_of
from llmc.errors import UnsupportedError, UsageError
from llmc.formats import FORMATS


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_names_formats_and_a_kv_type_that_exist(name):
    scheme = scheme_of(name)
    assert {scheme.matrices, scheme.vocabulary, scheme.fallback} <= set(FORMATS)
    assert scheme.kv in KV_DTYPES
    assert 0 < scheme.max_mean_abs < scheme.max_abs


@pytest.mark.parametrize("name", SCHEMES)
def test_the_fallback_takes_rows_of_any_length(name):
    assert FORMATS[scheme_of(name).fallback].group == 0


def test_an_unknown_scheme_is_refused_with_those_that_exist():
    with pytest.raises(UsageError, match="unknown quantization 'w3a16'") as raised:
        scheme_of("w3a16")
    assert "w4a16-g128" in str(raised.value)


def test_what_a_target_lacks_is_refused_with_what_serves_as_well():
    with pytest.raises(UnsupportedError, match="fp8: cpu has no products of fp8") as raised:
        scheme_of("fp8").resolved("cpu", frozenset(), frozenset({"fp8"}))
    assert "w8a16" in (raised.value.hint or "")
    assert scheme_of("fp8").resolved("cuda", frozenset()).matrices == "fp8"


def test_a_group_that_does_not_divide_the_features_falls_back():
    choose = scheme_of("w4a16-g128").choose({})
    assert choose(["a"], 256, False) == "w4-g128"
    assert choose(["a"], 192, False) == "w8"
    assert choose(["a"], 256, True) == "w8"


def test_float_schemes_take_every_weight_alike():
    choose = scheme_of("bf16").choose({})
    assert {choose(["a"], 7, is_vocabulary) for is_vocabulary in (False, True)} == {"bf16"}


def test_keep_takes_each_tensors_own_format():
    choose = scheme_of("keep").choose({"a": "q4_k", "b": "q6_k", "c": "q4_k", "d": "iq1_s"})
    assert choose(["a"], 256, False) == "q4_k"
    assert choose(["a", "c"], 256, True) == "q4_k"
    assert choose(["a", "b"], 256, False) == "f32"  # one argument has one format
    assert choose(["d"], 256, False) == "f32"  # a format without kernels
    assert choose(["unknown"], 256, False) == "f32"

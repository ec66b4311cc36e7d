import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from llmc.compiler.tokenizer_file import compact

VOCAB = {"a": 0, "b": 1, "ab": 2, "é": 3, "abé": 4, "#version": 5, "#versiona": 6, " ": 7, "a ": 8}


def tokenizer_json(*merges):
    tokenizer = Tokenizer(models.BPE(VOCAB, list(merges), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer.to_str().encode()


def test_the_tokenizer_is_the_same_with_shorter_merges():
    given = tokenizer_json(("a", "b"), ("ab", "é"))
    made = compact(given)
    assert json.loads(made)["model"]["merges"] == ["a b", "ab é"]
    assert json.loads(Tokenizer.from_buffer(made).to_str()) == json.loads(given)
    assert compact(made) == made


@pytest.mark.parametrize("merge", [("#version", "a"), ("a", " ")])
def test_merges_that_a_line_cannot_say_stay_pairs(merge):
    given = tokenizer_json(("a", "b"), merge)
    assert compact(given) == given


def test_other_models_stay_as_they_are():
    given = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode()
    assert compact(given) == given

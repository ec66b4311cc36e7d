"""Tokenizers built from GGUF metadata against plain reference implementations."""

import random
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import byte_level_vocabulary, write_gguf
from tokenizers import Tokenizer

from llmc.errors import ImportModelError, UnsupportedError
from llmc.models.gguf_file import GgufFile
from llmc.models.gguf_tokenizer import build_tokenizer
from llmc.models.names import gguf_split_schemes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def build(path: Path, **fields: object) -> Tokenizer:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    write_gguf(path / "m.gguf", "tiny", metadata, {})
    raw = build_tokenizer(GgufFile.open(path / "m.gguf"))
    assert raw is not None
    return Tokenizer.from_buffer(raw)


def byte_level(path: Path, pre: str, extra: list[str] = (), **fields: object) -> Tokenizer:
    tokens = byte_level_vocabulary(extra)
    return build(path, model="gpt2", pre=pre, tokens=tokens, **fields)


PIECES = {
    "default": ("It's 12345 ok?!", ["It", "'", "s", " ", "123", "45", " ok", "?!"]),
    "gpt-2": ("It's 12345  ok", ["It", "'s", " 12345", " ", " ok"]),
    "smollm": ("in 1969.", ["in", " ", "1", "9", "6", "9", "."]),
    "starcoder": ("x=10", ["x", "=", "1", "0"]),
    "refact": ("x=10", ["x", "=", "1", "0"]),
    "command-r": ("a 42", ["a", " ", "4", "2"]),
    "olmo": ("a 42", ["a", " 42"]),
    "llama-bpe": ("IT'S 1234567\n\n x", ["IT", "'S", " ", "123", "456", "7", "\n\n", " x"]),
    "dbrx": ("a1234", ["a", "123", "4"]),
    "qwen2": ("don't 123", ["don", "'t", " ", "1", "2", "3"]),
    "qwen35": ("ne\u0301e 12", ["ne\u0301e", " ", "1", "2"]),
    "deepseek-llm": ("Hi 中文 123.", ["Hi", " ", "中文", " ", "123", "."]),
    "deepseek-coder": ("x 123", ["x", " ", "1", "2", "3"]),
    "deepseek-v3": ("abc 12345中文", ["abc", " ", "123", "45", "中文"]),
    "falcon": ("a 12345!", ["a", " ", "123", "45", "!"]),
    "gpt-4o": ("helloWorld's 1234", ["hello", "World's", " ", "123", "4"]),
    "tekken": ("helloWorld 12", ["hello", "World", " ", "1", "2"]),
    "bloom": ("Hello, world", ["Hello", ",", " world"]),
    "viking": ("ab12", ["ab", "1", "2"]),
    "bailingmoe": ("a\n\nb", ["a", "\n\n", "b"]),
    "seed-coder": ("a ;\n", ["a", " ;", "\n"]),
    "minicpm5": ("a 1234", ["a", " ", "123", "4"]),
    "tiny_aya": ("n 1234567", ["n", " ", "1", "234", "567"]),
}


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_split_as_the_pre_tokenizer_says(pre: str, tmp_path: Path) -> None:
    text, pieces = PIECES[pre]
    tokenizer = byte_level(tmp_path, pre)
    cuts = [cut for _, cut in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in cuts] == pieces


def test_every_known_pre_tokenizer_builds_and_loses_no_byte(tmp_path: Path) -> None:
    text = "Ünï 12345 \t\n x_y 中文 🙂 'll"
    for pre in gguf_split_schemes():
        tokenizer = byte_level(tmp_path, pre, add_bos_token=False)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text, pre


def test_an_unknown_pre_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="never-heard-of"):
        byte_level(tmp_path, "never-heard-of")


def test_an_unknown_kind_of_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="abacus"):
        build(tmp_path, model="abacus", tokens=["a"])


def test_merges_apply_in_the_files_order(tmp_path: Path) -> None:
    merges = ["b c", "a b"]
    tokenizer = byte_level(tmp_path, "gpt-2", ["ab", "bc"], merges=merges)
    assert tokenizer.encode("abc").tokens == ["a", "bc"]


def test_a_piece_that_is_a_token_is_taken_whole_only_where_the_scheme_says(tmp_path: Path) -> None:
    fields = {"merges": ["a b"], "add_bos_token": False}
    whole = byte_level(tmp_path, "llama-bpe", ["ab", "abc"], **fields)
    merged = byte_level(tmp_path, "qwen2", ["ab", "abc"], **fields)
    assert whole.encode("abc").tokens == ["abc"]
    assert merged.encode("abc").tokens == ["ab", "c"]


def test_control_tokens_are_special_and_user_defined_ones_are_text(tmp_path: Path) -> None:
    tokens = byte_level_vocabulary(["<|end|>", "<think>"])
    types = [NORMAL] * 256 + [CONTROL, USER_DEFINED]
    tokenizer = byte_level(tmp_path, "gpt-2", ["<|end|>", "<think>"], token_type=types)
    ids = tokenizer.encode("a<think><|end|>").ids
    assert ids == [tokens.index("a"), 257, 256]
    assert tokenizer.decode(ids) == "a<think>"
    assert tokenizer.get_vocab_size() == 258


@pytest.mark.parametrize(
    ("pre", "stated", "expected"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_the_beginning_token_is_added_where_the_file_asks(
    pre: str, stated: bool | None, expected: bool, tmp_path: Path
) -> None:
    fields = {} if stated is None else {"add_bos_token": stated}
    tokenizer = byte_level(
        tmp_path, pre, ["<s>"], token_type=[NORMAL] * 256 + [CONTROL], bos_token_id=256, **fields
    )
    assert tokenizer.encode("ab").tokens == (["<s>"] if expected else []) + ["a", "b"]
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["a", "b"]


def test_the_end_token_is_added_where_the_file_asks(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, "gpt-2", ["</s>"], eos_token_id=256, add_eos_token=True)
    assert tokenizer.encode("ab").tokens == ["a", "b", "</s>"]


BAD = {
    "a merge of one token": ({"merges": ["ab"]}, "merge 'ab'"),
    "a merge of unknown tokens": ({"merges": ["xx yy"]}, "makes no tokenizer"),
    "too few types": ({"token_type": [1, 1]}, "2 token types for 256 tokens"),
    "a beginning token outside": ({"add_bos_token": True, "bos_token_id": 999}, "999"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_inconsistent_vocabulary_is_named(case: str, tmp_path: Path) -> None:
    fields, message = BAD[case]
    with pytest.raises(ImportModelError, match=message):
        byte_level(tmp_path, "gpt-2", **fields)


def best_score_first(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's byte-pair encoding: merge the neighbours whose union has the best score."""
    pieces = list(text)
    while True:
        pairs = [
            (-scores[pieces[i] + pieces[i + 1]], i)
            for i in range(len(pieces) - 1)
            if pieces[i] + pieces[i + 1] in scores
        ]
        if not pairs:
            return pieces
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def sentencepiece(path: Path, words: list[str], **fields: object) -> Tokenizer:
    head = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*head, *raw, *words]
    return build(
        path,
        model="llama",
        tokens=tokens,
        scores=[0.0] * 259 + [-float(i) for i in range(len(words))],
        token_type=[UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words),
        unknown_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )


def test_pieces_merge_by_score_as_in_the_reference_algorithm(tmp_path: Path) -> None:
    rng = random.Random(3)
    letters = list("\u2581abc")
    longer = {"".join(rng.choices(letters, k=rng.randint(2, 5))) for _ in range(120)}
    words = [*sorted(longer), *letters]
    rng.shuffle(words)
    tokenizer = sentencepiece(tmp_path, words)
    scores = {word: -float(i) for i, word in enumerate(words)}

    for _ in range(200):
        text = "".join(rng.choices(" abc", k=rng.randint(1, 30)))
        expected = best_score_first("\u2581" + text.replace(" ", "\u2581"), scores)
        encoded = tokenizer.encode(text)
        assert encoded.tokens == ["<s>", *expected]
        assert tokenizer.decode(encoded.ids) == text


def test_characters_outside_the_vocabulary_become_bytes(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, ["\u2581", "a"])
    encoded = tokenizer.encode("aé")
    assert encoded.tokens == ["<s>", "\u2581", "a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded.ids) == "aé"


def test_no_space_is_put_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = sentencepiece(
        tmp_path, ["\u2581", "a"], add_space_prefix=False, add_bos_token=False
    )
    assert tokenizer.encode("a a").tokens == ["a", "\u2581", "a"]
    assert tokenizer.decode(tokenizer.encode(" a").ids) == " a"


def test_a_unigram_vocabulary_cuts_at_the_best_sum_of_scores(tmp_path: Path) -> None:
    tokens = ["<unk>", "\u2581", "a", "b", "ab", "\u2581a", "bb"]
    scores = np.array([0.0, -2.0, -3.0, -3.0, -2.5, -2.2, -1.0]).tolist()
    tokenizer = build(
        tmp_path,
        model="t5",
        tokens=tokens,
        scores=scores,
        token_type=[UNKNOWN] + [NORMAL] * 6,
        unknown_token_id=0,
    )
    # "▁a" + "bb" scores -3.2, "▁" + "ab" + "b" -7.5.
    assert tokenizer.encode("abb").tokens == ["\u2581a", "bb"]
    assert tokenizer.decode(tokenizer.encode("abb a").ids) == "abb a"


def test_scores_must_fit_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match="2 token scores for 3 tokens"):
        build(tmp_path, model="llama", tokens=["a", "b", "c"], scores=[0.0, 1.0])

"""Text comes out piece by piece exactly as the tokenizer decodes it at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import byte_level_tokenizer, sentencepiece_tokenizer, word_piece_tokenizer

from llmc.errors import ArtifactError, RequestError
from llmc.runtime.detokenizer import ByteDetokenizer, WindowDetokenizer
from llmc.runtime.tokenizer import Tokenizer

BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()
WORD_PIECE = word_piece_tokenizer()
TEXT = st.text(st.sampled_from("ab hello,é😀👩‍👩‍👧日本\n\t�"), max_size=40)


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int] = []) -> list[str]:  # noqa: B006
    detokenizer = tokenizer.detokenizer(prompt)
    return [*(detokenizer.feed(i) for i in ids), detokenizer.flush()]


def test_each_family_has_its_detokenizer():
    assert isinstance(BYTE_LEVEL.detokenizer([]), ByteDetokenizer)
    assert isinstance(SENTENCEPIECE.detokenizer([]), ByteDetokenizer)
    assert isinstance(WORD_PIECE.detokenizer([]), WindowDetokenizer)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte", "spm"])
@given(text=TEXT)
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_text_and_hold_no_half_character(tokenizer, text):
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids) == text
    if "�" not in text:
        assert not any("�" in part for part in parts)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte", "spm"])
@given(text=TEXT, cut=st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_an_answer_goes_on_where_the_prompt_ended(tokenizer, text, cut):
    ids = tokenizer.encode("hello" + text)
    cut = 1 + cut % len(ids)
    answer = "".join(pieces(tokenizer, ids[cut:], ids[:cut]))
    # The answer is all but the prompt's whole characters: one that is cut in two comes with it.
    prompt = b"".join(map(tokenizer.token_bytes, ids[:cut])).decode(errors="ignore")
    assert prompt.removeprefix(" ") + answer == "hello" + text


def test_an_emoji_of_four_tokens_comes_whole():
    ids = BYTE_LEVEL.encode("a😀")
    assert len(ids) == 5
    assert pieces(BYTE_LEVEL, ids) == ["a", "", "", "", "😀", ""]


def test_half_a_character_at_the_end_becomes_a_replacement():
    ids = BYTE_LEVEL.encode("a😀")[:-1]
    assert pieces(BYTE_LEVEL, ids) == ["a", "", "", "", "�"]
    assert BYTE_LEVEL.decode(ids) == "a�"


def test_special_tokens_are_no_text_and_added_ones_are():
    ids = BYTE_LEVEL.encode("<s>the<tool>  dog</s>")
    assert BYTE_LEVEL.token_id("<s>") == ids[0]
    assert "".join(pieces(BYTE_LEVEL, ids)) == "the<tool>  dog"
    assert BYTE_LEVEL.token_bytes(ids[0]) == b"<s>"
    assert BYTE_LEVEL.is_special(ids[0])
    assert not BYTE_LEVEL.is_special(BYTE_LEVEL.token_id("<tool>"))


def test_a_leading_space_is_dropped_at_a_beginning_only():
    hello = SENTENCEPIECE.token_id("▁hello")
    bos = SENTENCEPIECE.token_id("<s>")
    assert "".join(pieces(SENTENCEPIECE, [hello, hello])) == "hello hello"
    assert "".join(pieces(SENTENCEPIECE, [hello], [hello])) == " hello"
    assert "".join(pieces(SENTENCEPIECE, [hello], [hello, bos])) == "hello"
    assert "".join(pieces(SENTENCEPIECE, [bos, hello, bos, hello])) == "hello hello"


def test_token_bytes_are_the_tokens_own():
    assert SENTENCEPIECE.token_bytes(SENTENCEPIECE.token_id("<0xF0>")) == b"\xf0"
    assert SENTENCEPIECE.token_bytes(SENTENCEPIECE.token_id("▁hello")) == b" hello"
    ids = BYTE_LEVEL.encode("é😀")
    assert b"".join(map(BYTE_LEVEL.token_bytes, ids)).decode() == "é😀"
    assert BYTE_LEVEL.token_text(5000) == ""


def test_other_tokenizers_are_decoded_by_a_window():
    ids = [*WORD_PIECE.encode("hello worlds, the world"), 1, *WORD_PIECE.encode("the")]
    assert "".join(pieces(WORD_PIECE, ids)) == WORD_PIECE.decode(ids)
    assert "".join(pieces(WORD_PIECE, ids[2:], ids[:2])) == "lds , the world the"


def test_a_window_never_holds_text_back_for_good():
    # Bytes that never become a character: each is given out once no character can contain it.
    window = WindowDetokenizer(BYTE_LEVEL.decode, context=[], skipped=frozenset())
    lone = BYTE_LEVEL.token_id("Ģ")  # 0x80, a continuation byte
    written = "".join(window.feed(lone) for _ in range(50))
    assert 40 <= len(written) <= 50
    assert set(written) == {"�"}


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    inner = byte_level_tokenizer()._tokenizer
    inner.enable_truncation(3)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert loaded.decode(loaded.encode("hello there, brown fox")) == "hello there, brown fox"


def test_a_bad_file_is_an_artifact_error(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in ("", "{}", "[1", '{"model": 3}'):
        path.write_text(content)
        with pytest.raises(ArtifactError, match="not a tokenizer"):
            Tokenizer.from_file(path)


def test_lone_surrogates_are_a_request_error():
    with pytest.raises(RequestError, match="surrogate at 1"):
        BYTE_LEVEL.encode("a\ud800")

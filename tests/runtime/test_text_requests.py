"""Requests in text: stop strings, half characters and chat, over a scripted model."""

from __future__ import annotations

import numpy as np
import pytest
from fake_model import check, make_manifest
from text_models import byte_level_tokenizer

from llmc.errors import RequestError
from llmc.runtime.chat_template import ChatTemplate
from llmc.runtime.engine import Engine
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.step import StepInputs

TOKENIZER = byte_level_tokenizer()
EOS = TOKENIZER.token_id("</s>")
GREEDY = SamplingParams(temperature=0)


class ScriptedExecutor:
    """Says a given text token by token: the logits depend on the position alone."""

    chooses = False
    begin = None

    def __init__(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        self.token_ids = token_ids
        self.num_prompt_tokens = num_prompt_tokens

    def step(self, inputs: StepInputs) -> np.ndarray:
        logits = np.zeros((len(inputs.logits_rows), TOKENIZER.vocab_size), np.float32)
        for row, at in enumerate(inputs.positions[inputs.logits_rows]):
            place = int(at) + 1 - self.num_prompt_tokens
            logits[row, self.token_ids[min(max(place, 0), len(self.token_ids) - 1)]] = 9
        return logits


def engine_saying(text: str, prompt: str = "the", *, ids: list[int] | None = None) -> Engine:
    ids = [*TOKENIZER.encode(text), EOS] if ids is None else ids
    manifest = make_manifest(vocab_size=TOKENIZER.vocab_size, stop_token_ids=(EOS,))
    executor = ScriptedExecutor(ids, len(TOKENIZER.encode(prompt)))
    return Engine.from_parts(
        manifest,
        executor,
        num_pages=[64],
        tokenizer=TOKENIZER,
        chat_template=ChatTemplate("{% for m in messages %}<s>{{ m.content }}{% endfor %}"),
    )


def test_an_answer_in_text_ends_at_the_models_stop_token():
    output = engine_saying("hello 😀 there").generate("the", GREEDY)[0]
    assert output.text == "hello 😀 there"
    assert output.finish_reason == "stop"
    assert output.token_ids[-1] == EOS


@pytest.mark.parametrize(
    ("stops", "expected"),
    [(["fox"], "hello, "), (["llo, f"], "he"), (["😀"], "hello, fox "), (["x", "e"], "h")],
)
def test_stop_strings_over_token_borders_are_not_given_out(stops, expected):
    engine = engine_saying("hello, fox 😀 end")
    params = SamplingParams(temperature=0, stop=stops)
    deltas = list(engine.stream("the", params))
    assert "".join(d.text for d in deltas) == expected
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].token_ids != [EOS]
    check(engine)
    assert engine.stats.kv_cache_usage_ratio == 0


def test_text_held_back_for_a_stop_string_comes_at_the_end():
    for text, stop in [("hello ST", "STOP"), ("hello ", " STOP")]:
        params = SamplingParams(temperature=0, stop=stop)
        output = engine_saying(text).generate("the", params)[0]
        assert (output.text, output.finish_reason) == (text, "stop")
        cut = SamplingParams(temperature=0, stop=stop, max_tokens=len(TOKENIZER.encode(text)))
        output = engine_saying(text).generate("the", cut)[0]
        assert (output.text, output.finish_reason) == (text, "length")


def test_no_delta_holds_half_a_character():
    engine = engine_saying("a😀é日本")
    deltas = list(engine.stream("the", GREEDY))
    assert not any("�" in d.text for d in deltas)
    assert "".join(d.text for d in deltas) == "a😀é日本"
    assert sum(not d.text for d in deltas) >= 6  # bytes without a whole character


def test_a_character_cut_by_the_length_limit_is_a_replacement():
    output = engine_saying("a😀").generate("the", SamplingParams(temperature=0, max_tokens=3))[0]
    assert output.text == "a�"


def test_a_stop_string_before_min_tokens_is_text():
    engine = engine_saying("dog dog dog dog")
    first = len(TOKENIZER.encode("dog dog"))
    params = SamplingParams(temperature=0, stop="dog", min_tokens=first + 1)
    assert engine.generate("the", params)[0].text.count("dog") >= 2


def test_a_custom_stop_token_has_no_text():
    ids = TOKENIZER.encode("hello dog")
    params = SamplingParams(temperature=0, stop_token_ids=[ids[-1]])
    output = engine_saying("", ids=ids).generate("the", params)[0]
    assert output.text == TOKENIZER.decode(ids[:-1])
    assert output.token_ids == ids


def test_a_failing_detokenizer_ends_its_own_sequence_only(monkeypatch):
    engine = engine_saying("hello there")
    detokenizer = TOKENIZER.detokenizer
    calls = iter([True, False])

    def broken_first(prompt):
        made = detokenizer(prompt)
        if next(calls):
            monkeypatch.setattr(made, "feed", lambda _: 1 / 0)
        return made

    monkeypatch.setattr(TOKENIZER, "detokenizer", broken_first)
    outputs = engine.generate(["the", "the"], GREEDY)
    assert [o.finish_reason for o in outputs] == ["error", "stop"]
    assert outputs[1].text == "hello there"


def test_a_conversation_is_rendered_and_tokenized_once():
    engine = engine_saying("hi")
    ids = engine.chat_prompt([{"role": "user", "content": "hello"}])
    assert ids == [TOKENIZER.token_id("<s>"), *TOKENIZER.encode("hello")]
    with pytest.raises(RequestError, match="empty"):
        engine.chat_prompt([])


def test_a_model_without_a_template_says_so():
    manifest = make_manifest(vocab_size=TOKENIZER.vocab_size)
    engine = Engine.from_parts(manifest, ScriptedExecutor([1], 1), num_pages=[8])
    with pytest.raises(RequestError, match="toy has no chat template"):
        engine.chat_prompt([{"role": "user", "content": "hello"}])


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch):
    engine = engine_saying("hi")
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: pytest.fail("tokenized"))
    with pytest.raises(RequestError, match="characters, at most"):
        engine.submit("a", "x" * 10_000_000, GREEDY)

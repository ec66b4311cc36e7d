"""What the official client gets from the server equals what the engine gives directly."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import RunningServer, toy_engine
from toy_artifact import TEMPLATE, reference_logits

from llmc.runtime.sampling_params import SamplingParams

GREEDY = {"temperature": 0.0, "max_tokens": 24}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello there"},
]


def direct(prompt: str | list[int], **params: object):
    """The engine's own answer, from an engine that serves nothing else."""
    return toy_engine().generate([prompt], SamplingParams(**{**GREEDY, **params}))[0]


def chat_prompt() -> list[int]:
    return toy_engine().chat_prompt(MESSAGES)


def test_a_chat_answer_is_the_engines(server: RunningServer) -> None:
    expected = direct(chat_prompt())
    answer = server.client.chat.completions.create(model="toy", messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    assert answer.model == "toy"
    assert answer.usage.prompt_tokens == len(chat_prompt())
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == len(chat_prompt()) + 24


def test_the_chat_template_makes_the_prompt(server: RunningServer) -> None:
    text = "system: be brief\nuser: hello there\nassistant:"
    assert toy_engine().chat_template.render(MESSAGES) == text
    assert TEMPLATE.endswith("assistant:")
    by_template = server.client.chat.completions.create(model="toy", messages=MESSAGES, **GREEDY)
    plain = server.client.completions.create(model="toy", prompt=text, **GREEDY)
    assert by_template.choices[0].message.content == plain.choices[0].text


def test_content_parts_and_message_objects_of_the_sdk_are_taken(server: RunningServer) -> None:
    first = server.client.chat.completions.create(model="toy", messages=MESSAGES, **GREEDY)
    parts = [{"type": "text", "text": "hello there"}]
    same = server.client.chat.completions.create(
        model="toy",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts},
        ],
        **GREEDY,
    )
    assert same.choices[0].message.content == first.choices[0].message.content
    history = [*MESSAGES, first.choices[0].message.model_dump(), {"role": "user", "content": "so"}]
    answer = server.client.chat.completions.create(model="toy", messages=history, **GREEDY)
    expected = toy_engine().chat_prompt(
        [
            *MESSAGES,
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": "so"},
        ]
    )
    assert answer.choices[0].message.content == direct(expected).text


def test_a_chat_stream_carries_role_text_end_and_usage(server: RunningServer) -> None:
    chunks = list(
        server.client.chat.completions.create(
            model="toy",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
    assert text == direct(chat_prompt()).text
    assert [c.choices[0].finish_reason for c in parts][-1] == "length"
    assert all(c.choices[0].finish_reason is None for c in parts[:-1])
    assert all(chunk.usage is None for chunk in parts)
    assert last.choices == []
    assert last.usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_include_usage_has_none(server: RunningServer) -> None:
    chunks = list(
        server.client.completions.create(model="toy", prompt="hello", stream=True, **GREEDY)
    )
    assert "".join(c.choices[0].text for c in chunks) == direct("hello").text
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_prompts_may_be_texts_or_token_ids_one_or_many(server: RunningServer) -> None:
    encode = toy_engine().tokenizer.encode
    first, second = direct("hello").text, direct("the quick").text
    for prompt, expected in (
        ("hello", [first]),
        (encode("hello"), [first]),
        (["hello", "the quick"], [first, second]),
        ([encode("hello"), encode("the quick")], [first, second]),
    ):
        answer = server.client.completions.create(model="toy", prompt=prompt, **GREEDY)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))


def test_n_choices_differ_and_a_seed_repeats_them(server: RunningServer) -> None:
    def ask(seed: int, *, stream: bool = False):
        return server.client.completions.create(
            model="toy",
            prompt=["hello", "world"],
            n=3,
            seed=seed,
            temperature=1.5,
            max_tokens=12,
            stream=stream,
        )

    texts = [choice.text for choice in ask(1).choices]
    assert len(texts) == 6
    assert len(set(texts)) == 6
    assert [choice.text for choice in ask(1).choices] == texts
    assert [choice.text for choice in ask(2).choices] != texts
    streamed = [""] * 6
    for chunk in ask(1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_a_stop_string_ends_the_answer_before_it(server: RunningServer) -> None:
    whole = direct("hello").text
    stop = whole[10:13]
    expected = whole[: whole.index(stop)]
    answer = server.client.completions.create(model="toy", prompt="hello", stop=stop, **GREEDY)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "stop"
    chunks = server.client.completions.create(
        model="toy", prompt="hello", stop=["never-comes", stop], stream=True, **GREEDY
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_sampling_parameters_reach_the_engine(server: RunningServer) -> None:
    encode = toy_engine().tokenizer.encode
    options = {"logit_bias": {str(encode("z")[0]): 100.0}, "max_tokens": 5, "temperature": 0}
    answer = server.client.completions.create(model="toy", prompt="hello", **options)
    assert answer.choices[0].text == "zzzzz"
    penalized = server.client.completions.create(
        model="toy", prompt="hello", frequency_penalty=2, presence_penalty=2, **GREEDY
    )
    expected = direct("hello", frequency_penalty=2, presence_penalty=2).text
    assert penalized.choices[0].text == expected
    only_best = server.client.completions.create(
        model="toy",
        prompt="hello",
        max_tokens=24,
        temperature=2,
        extra_body={"top_k": 1},
    )
    assert only_best.choices[0].text == direct("hello").text


def test_fields_that_do_not_change_the_answer_are_ignored(server: RunningServer) -> None:
    answer = server.client.chat.completions.create(
        model="toy",
        messages=MESSAGES,
        user="someone",
        metadata={"a": "b"},
        store=True,
        response_format={"type": "text"},
        extra_body={"tools": [], "tool_choice": "none", "stop": None},
        **GREEDY,
    )
    assert answer.choices[0].message.content == direct(chat_prompt()).text


def test_an_unlimited_chat_answer_ends_with_the_context(server: RunningServer) -> None:
    answer = server.client.chat.completions.create(
        model="toy", messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 512


def test_chat_logprobs_spell_the_answer(server: RunningServer) -> None:
    answer = server.client.chat.completions.create(
        model="toy", messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    )
    entries = answer.choices[0].logprobs.content
    expected = direct(chat_prompt(), logprobs=3)
    assert [e.logprob for e in entries] == pytest.approx([e.logprob for e in expected.logprobs])
    spelled = b"".join(bytes(e.bytes) for e in entries)
    assert spelled.decode("utf-8", "replace") == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        # Greedy takes the likeliest token, so it is the first alternative.
        assert entry.top_logprobs[0].logprob == entry.logprob


def test_streamed_logprobs_are_those_of_the_whole_answer(server: RunningServer) -> None:
    for options in ({"logprobs": True}, {"logprobs": True, "top_logprobs": 2}):
        whole = server.client.chat.completions.create(
            model="toy", messages=MESSAGES, **options, **GREEDY
        )
        chunks = server.client.chat.completions.create(
            model="toy", messages=MESSAGES, stream=True, **options, **GREEDY
        )
        streamed = [e for c in chunks if (lp := c.choices[0].logprobs) for e in lp.content]
        assert streamed == whole.choices[0].logprobs.content


def test_completion_logprobs_are_parallel_lists(server: RunningServer) -> None:
    answer = server.client.completions.create(model="toy", prompt="hello", logprobs=2, **GREEDY)
    logprobs, expected = answer.choices[0].logprobs, direct("hello", logprobs=2)
    assert logprobs.token_logprobs == pytest.approx([e.logprob for e in expected.logprobs])
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.top_logprobs) == 24
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_the_stop_token_is_no_part_of_the_logprobs(server: RunningServer) -> None:
    answer = server.client.chat.completions.create(
        model="toy",
        messages=MESSAGES,
        max_tokens=5,
        logprobs=True,
        logit_bias={"1": 100},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == ""
    assert answer.choices[0].logprobs.content == []


def test_a_prompt_can_be_scored_without_an_answer(server: RunningServer) -> None:
    """What evaluation harnesses ask for: echo, log-probabilities and nothing generated."""
    prompt = "the quick brown fox"
    ids = toy_engine().tokenizer.encode(prompt)
    answer = server.client.completions.create(
        model="toy", prompt=prompt, echo=True, logprobs=1, max_tokens=0
    )
    choice = answer.choices[0]
    assert choice.text == prompt
    assert "".join(choice.logprobs.tokens) == prompt
    offsets = choice.logprobs.text_offset
    for token, offset in zip(choice.logprobs.tokens, offsets, strict=True):
        assert prompt.startswith(token, offset)
    assert choice.logprobs.token_logprobs[0] is None
    for position, logprob in enumerate(choice.logprobs.token_logprobs[1:], start=1):
        logits = reference_logits(server.engine.manifest, ids[:position]).astype(float)
        expected = logits[ids[position]] - math.log(sum(map(math.exp, logits)))
        assert logprob == pytest.approx(expected, abs=1e-5)  # float32 logits


def test_echo_repeats_the_prompt_whole_and_streamed(server: RunningServer) -> None:
    expected = "hello" + direct("hello").text
    for prompt in ("hello", toy_engine().tokenizer.encode("hello")):
        answer = server.client.completions.create(model="toy", prompt=prompt, echo=True, **GREEDY)
        assert answer.choices[0].text == expected
    chunks = server.client.completions.create(
        model="toy", prompt="hello", echo=True, stream=True, **GREEDY
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_requests_side_by_side_get_what_they_get_alone(server: RunningServer) -> None:
    prompts = [f"hello {i} the quick brown fox"[: 8 + i] for i in range(24)]
    alone = toy_engine().generate(prompts, SamplingParams(**GREEDY))

    def ask(prompt: str) -> str:
        answer = server.client.completions.create(model="toy", prompt=prompt, **GREEDY)
        return answer.choices[0].text

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, prompts)) == [output.text for output in alone]
    server.wait_until_free()


def test_models_lists_the_one_model(server: RunningServer) -> None:
    assert [model.id for model in server.client.models.list()] == ["toy"]
    assert server.client.models.retrieve("toy").owned_by == "llmc"

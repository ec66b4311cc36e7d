"""The engine over the toy model: what a request gets never depends on what runs beside it."""

from __future__ import annotations

import numpy as np
import pytest
from fake_model import (
    check,
    make_engine,
    make_manifest,
    reference_greedy,
    reference_logits,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import CapacityError, RequestError, UsageError
from llmc.runtime.outputs import Delta
from llmc.runtime.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=20)
WINDOWED = ((None, 4), (6, 2), (1, 4), (9, 8))


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 97, rng.integers(1, longest)).tolist() for _ in range(count)]


def run_checked(engine) -> list[Delta]:
    deltas = []
    while engine.has_work():
        deltas += engine.step()
        check(engine)
    return deltas


def assert_idle(engine) -> None:
    """Nothing runs and every page is free."""
    check(engine)
    assert engine.stats.num_running == engine.stats.num_waiting == 0
    assert engine.stats.kv_cache_usage_ratio == 0
    assert not engine.has_work()


@pytest.mark.parametrize(
    "groups", [((None, 4),), ((5, 4),), WINDOWED], ids=["full", "window", "all"]
)
def test_many_requests_together_give_what_each_gives_alone(groups):
    manifest = make_manifest(groups=groups)
    engine = make_engine(manifest)
    prompts = random_prompts(32, 90)
    outputs = engine.generate(prompts, GREEDY)
    assert [o.token_ids for o in outputs] == [reference_greedy(manifest, p, 20) for p in prompts]
    assert max(len(s.kv_lens) for s in engine._executor.steps) == 8  # they did share steps
    assert_idle(engine)


@pytest.mark.parametrize("groups", [((None, 4),), WINDOWED], ids=["full", "all"])
def test_preempted_requests_give_the_same_tokens(groups):
    manifest = make_manifest(groups=groups)
    engine = make_engine(manifest, num_pages=[30] * len(groups))
    prompts = random_prompts(16, 40, seed=1)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    unstoppable = make_manifest(groups=groups, stop_token_ids=())
    ids = [f"r{i}" for i in range(len(prompts))]
    for request_id, prompt in zip(ids, prompts, strict=True):
        engine.submit(request_id, prompt, params)
    deltas = run_checked(engine)
    for request_id, prompt in zip(ids, prompts, strict=True):
        tokens = [t for d in deltas if d.request_id == request_id for t in d.token_ids]
        assert tokens == reference_greedy(unstoppable, prompt, 60)
    assert engine.stats.num_preemptions_total > 0
    assert engine.stats.prompt_tokens_total == sum(map(len, prompts))  # recomputation not counted
    assert engine.stats.generation_tokens_total == 60 * len(prompts)
    assert_idle(engine)


def test_a_long_prompt_is_computed_in_chunks_while_others_decode():
    manifest = make_manifest(max_tokens=16, stop_token_ids=())
    engine = make_engine(manifest)
    engine.submit("short", [5, 6], SamplingParams(temperature=0, max_tokens=30))
    engine.step()
    long = random_prompts(1, 2)[0] * 100
    engine.submit("long", long, GREEDY)
    mixed = 0
    while len(long) > 0 and not any(d.request_id == "long" for d in engine.step()):
        mixed += engine._executor.steps[-1].num_decodes == 1
        check(engine)
    # 100 tokens, 15 beside the decode: seven steps, the last of which gives the first token.
    assert mixed == 6
    run_checked(engine)


def test_a_windowed_group_holds_no_more_pages_than_the_window_needs():
    manifest = make_manifest(groups=((8, 4),), stop_token_ids=(), max_tokens=16)
    engine = make_engine(manifest, num_pages=[8])
    prompt = random_prompts(1, 2)[0] * 100
    engine.submit("a", prompt, SamplingParams(temperature=0, max_tokens=100))
    tokens = []
    while engine.has_work():
        tokens += [t for d in engine.step() for t in d.token_ids]
        check(engine)
        if tokens and engine.has_work():
            # A token sees 8; they touch at most 3 pages of 4.
            assert engine.stats.kv_cache_usage_ratio <= 3 / 8
    assert tokens == reference_greedy(manifest, prompt, 100)


def test_logits_are_the_models_whatever_the_chunks():
    manifest = make_manifest(groups=WINDOWED, max_tokens=32, max_logits_rows=5)
    engine = make_engine(manifest)
    tokens = random_prompts(1, 2)[0] * 50 + random_prompts(1, 60, seed=3)[0]
    expected = np.stack([reference_logits(manifest, tokens[: i + 1]) for i in range(len(tokens))])
    for chunk_tokens in (None, 1, 7, 32, 1000):
        engine._executor.steps.clear()
        np.testing.assert_array_equal(engine.logits(tokens, chunk_tokens=chunk_tokens), expected)
        assert engine._executor.steps[0].max_q_len == {None: 5, 1000: 32}.get(
            chunk_tokens, chunk_tokens
        )
    assert_idle(engine)


def test_logits_beside_running_requests_disturb_nobody():
    manifest = make_manifest(stop_token_ids=())
    engine = make_engine(manifest)
    engine.submit("a", [1, 2, 3], GREEDY)
    tokens = [t for d in engine.step() for t in d.token_ids]
    np.testing.assert_array_equal(
        engine.logits([9, 8, 7])[-1], reference_logits(manifest, [9, 8, 7])
    )
    tokens += [t for d in run_checked(engine) for t in d.token_ids]
    assert tokens == reference_greedy(manifest, [1, 2, 3], 20)


def test_logits_of_no_tokens_foreign_tokens_or_in_chunks_of_none_are_refused():
    engine = make_engine()
    with pytest.raises(RequestError, match="no tokens"):
        engine.logits([])
    with pytest.raises(RequestError, match="token id 97"):
        engine.logits([97])
    with pytest.raises(RequestError, match="at most 256"):
        engine.logits([1] * 257)
    with pytest.raises(UsageError, match="chunk_tokens is 0"):
        engine.logits([1], chunk_tokens=0)
    assert_idle(engine)


def test_logits_without_enough_pages_is_an_error_that_leaks_none():
    engine = make_engine(make_manifest(stop_token_ids=()), num_pages=[10])
    engine.submit("a", [1] * 20, SamplingParams(temperature=0, max_tokens=5))
    engine.step()
    with pytest.raises(CapacityError, match="beside the running"):
        engine.logits([1] * 30)
    run_checked(engine)
    assert_idle(engine)


def test_cancelling_frees_pages_at_once_and_reports_it():
    engine = make_engine(make_manifest(stop_token_ids=()))
    engine.submit("a", [1] * 40, GREEDY)
    engine.submit("b", [2] * 4, GREEDY)
    engine.step()
    engine.step()
    assert engine.cancel("a")
    assert not engine.cancel("a")
    assert not engine.cancel("nobody")
    check(engine)
    deltas = run_checked(engine)
    ends = {d.request_id: d.finish_reason for d in deltas if d.finish_reason}
    assert ends == {"a": "cancelled", "b": "length"}
    assert_idle(engine)


def test_a_waiting_request_can_be_cancelled():
    engine = make_engine(max_sequences=1)
    for name in "ab":
        engine.submit(name, [1, 2], GREEDY)
    engine.step()
    assert engine.stats.num_waiting == 1
    assert engine.cancel("b")
    assert engine.stats.num_waiting == 0
    run_checked(engine)
    assert_idle(engine)


def test_closing_a_stream_cancels_its_request():
    engine = make_engine(make_manifest(stop_token_ids=()))
    stream = engine.stream([1, 2, 3], GREEDY)
    first = next(stream)
    assert len(first.token_ids) == 1
    stream.close()
    assert_idle(engine)


def test_interleaved_streams_lose_nothing():
    manifest = make_manifest(stop_token_ids=())
    engine = make_engine(manifest)
    streams = [engine.stream(p, GREEDY) for p in ([1, 2], [3])]
    tokens: list[list[int]] = [[], []]
    engine.submit("other", [4], GREEDY)
    for _ in range(20):
        for i, stream in enumerate(streams):
            tokens[i] += next(stream).token_ids
    assert tokens == [reference_greedy(manifest, p, 20) for p in ([1, 2], [3])]
    others = [t for d in run_checked(engine) if d.request_id == "other" for t in d.token_ids]
    assert others == reference_greedy(manifest, [4], 20)


def test_a_stop_token_ends_the_answer_and_is_among_its_tokens():
    manifest = make_manifest(stop_token_ids=())
    free = reference_greedy(manifest, [1, 2, 3], 20)
    engine = make_engine(manifest)
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[free[4]])
    output = engine.generate([1, 2, 3], params)[0]
    assert output.token_ids == free[: free.index(free[4]) + 1]
    assert output.finish_reason == "stop"


def test_ignore_eos_and_min_tokens():
    prompt = [1, 2, 3]
    free = reference_greedy(make_manifest(stop_token_ids=()), prompt, 10)
    manifest = make_manifest(stop_token_ids=(free[1],))
    engine = make_engine(manifest)
    assert engine.generate(prompt, GREEDY)[0].token_ids == free[:2]
    ignoring = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    assert engine.generate(prompt, ignoring)[0].token_ids == free
    longer = SamplingParams(temperature=0, max_tokens=10, min_tokens=5)
    tokens = engine.generate(prompt, longer)[0].token_ids
    assert free[1] not in tokens[:5]
    assert len(tokens) >= 6


def test_an_answer_ends_at_the_context_length():
    engine = make_engine(make_manifest(context_length=24, stop_token_ids=()))
    output = engine.generate([1] * 20, SamplingParams(temperature=0, max_tokens=100))[0]
    assert len(output.token_ids) == 4
    assert output.finish_reason == "length"


def test_an_answer_ends_where_the_whole_kv_cache_is_full():
    engine = make_engine(make_manifest(stop_token_ids=()), num_pages=[6])
    assert engine.max_length == 24
    output = engine.generate([1] * 20, SamplingParams(temperature=0, max_tokens=100))[0]
    assert len(output.token_ids) == 4
    with pytest.raises(CapacityError, match="24 fit the KV cache"):
        engine.submit("a", [1] * 24, GREEDY)


def test_choices_of_one_request_differ_and_repeat_with_the_seed():
    engine = make_engine()
    params = SamplingParams(n=3, seed=11, max_tokens=12, ignore_eos=True)
    first, again = engine.generate([[5, 6], [5, 6]], params)
    tokens = [tuple(c.token_ids) for c in first.choices]
    assert len(set(tokens)) == 3
    assert tokens == [tuple(c.token_ids) for c in again.choices]
    assert [c.finish_reason for c in first.choices] == ["length"] * 3
    assert first.token_ids == first.choices[0].token_ids


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_preempted():
    params = SamplingParams(seed=5, max_tokens=30, ignore_eos=True, top_p=0.9)
    prompt = [7, 8, 9]
    alone = make_engine().generate(prompt, params)[0].token_ids
    others = random_prompts(10, 30)
    crowd = [SamplingParams(max_tokens=50, ignore_eos=True)] * 10
    for engine in (make_engine(), make_engine(num_pages=[25])):
        outputs = engine.generate([*others, prompt], [*crowd, params])
        assert outputs[-1].token_ids == alone
    assert engine.stats.num_preemptions_total > 0


def test_logprobs_are_the_models_own_distribution():
    manifest = make_manifest(stop_token_ids=())
    engine = make_engine(manifest)
    prompt = [3, 1, 4]
    params = SamplingParams(
        seed=1, max_tokens=6, logprobs=4, temperature=3.0, top_k=5, logit_bias={7: 50.0}
    )
    output = engine.generate(prompt, params)[0]
    tokens = prompt + output.token_ids
    assert output.logprobs is not None
    assert len(output.logprobs) == 6
    for i, entry in enumerate(output.logprobs):
        logits = reference_logits(manifest, tokens[: 3 + i]).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert entry.token_id == output.token_ids[i]
        # float32 logits, float64 sum: the error is that of exp in float32.
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-5)
        best = np.argsort(-expected, kind="stable")[:4]
        assert [t for t, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([p for _, p in entry.top], expected[best], atol=1e-5)


@pytest.mark.parametrize("num_pages", [[512], [31]])
def test_prompt_logprobs_score_each_token_once_whatever_the_chunks(num_pages):
    manifest = make_manifest(max_logits_rows=8, stop_token_ids=())
    engine = make_engine(manifest, num_pages=num_pages)
    prompts = random_prompts(6, 80, seed=4)
    scoring = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2)
    plain = SamplingParams(temperature=0, max_tokens=40)
    outputs = engine.generate(prompts, [plain, scoring] * 3)
    for prompt, output in list(zip(prompts, outputs, strict=True))[1::2]:
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for i, entry in enumerate(output.prompt_logprobs[1:], 1):
            logits = reference_logits(manifest, prompt[:i]).astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum())
            assert entry is not None
            assert entry.token_id == prompt[i]
            assert entry.logprob == pytest.approx(expected[prompt[i]], abs=1e-5)
        assert output.token_ids == reference_greedy(manifest, prompt, 4)
    assert (engine.stats.num_preemptions_total > 0) == (num_pages == [31])
    assert_idle(engine)


def test_scoring_alone_generates_nothing_and_may_fill_the_context():
    engine = make_engine(make_manifest(context_length=64))
    prompt = random_prompts(1, 2)[0] * 64
    output = engine.generate(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
    assert output.token_ids == []
    assert output.finish_reason == "length"
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 64
    assert_idle(engine)


def test_a_failing_executor_ends_the_running_and_the_engine_goes_on():
    manifest = make_manifest(stop_token_ids=())
    engine = make_engine(manifest, max_sequences=2)
    for name in "abc":
        engine.submit(name, [1, 2], GREEDY)
    engine.step()
    engine._executor.fail_next = RuntimeError("device lost")
    deltas = engine.step()
    assert {(d.request_id, d.finish_reason) for d in deltas} == {("a", "error"), ("b", "error")}
    check(engine)
    tokens = [t for d in run_checked(engine) for t in d.token_ids]
    assert tokens == reference_greedy(manifest, [1, 2], 20)
    assert_idle(engine)


def test_bad_logits_end_their_own_sequence_only():
    manifest = make_manifest(stop_token_ids=())
    engine = make_engine(manifest)
    engine._executor.spoil_token = 96
    outputs = engine.generate([[1, 96], [2, 3], [96]], GREEDY)
    assert [o.finish_reason for o in outputs] == ["error", "length", "error"]
    assert outputs[1].token_ids == reference_greedy(manifest, [2, 3], 20)
    assert_idle(engine)


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        "text without a tokenizer",
        [97],
        [-1],
        [2**31],
        [2**70],
        [1.5],
        [True],
        [[1]],
        ["a"],
        [None],
        [1] * 256,
        None,
        {"a": 1},
        [1, "a"],
    ],
    ids=str,
)
def test_bad_prompts_are_request_errors_and_change_nothing(prompt):
    engine = make_engine()
    with pytest.raises(RequestError) as info:
        engine.submit("a", prompt, GREEDY)
    assert info.value.param == "prompt"
    assert_idle(engine)


@pytest.mark.parametrize("name", ["stop_token_ids", "logit_bias"])
def test_parameters_that_name_tokens_outside_the_vocabulary_are_refused(name):
    value = [97] if name == "stop_token_ids" else {97: 1.0}
    with pytest.raises(RequestError, match="0 to 96") as info:
        make_engine().submit("a", [1], SamplingParams(**{name: value}))
    assert info.value.param == name


def test_a_full_queue_and_a_used_id_are_refused():
    engine = make_engine(max_waiting=2)
    engine.submit("a", [1], GREEDY)
    with pytest.raises(RequestError, match="in use"):
        engine.submit("a", [1], GREEDY)
    engine.submit("b", [1], GREEDY)
    with pytest.raises(CapacityError, match="at most 2"):
        engine.submit("c", [1], GREEDY)
    run_checked(engine)
    engine.submit("a", [1], GREEDY)
    run_checked(engine)


def test_generate_takes_more_prompts_than_the_queue_holds():
    manifest = make_manifest()
    engine = make_engine(manifest, max_waiting=2)
    prompts = random_prompts(20, 10)
    outputs = engine.generate(prompts, GREEDY)
    assert [o.token_ids for o in outputs] == [reference_greedy(manifest, p, 20) for p in prompts]


def test_generate_waits_while_others_fill_the_queue():
    manifest = make_manifest(max_sequences=1)
    engine = make_engine(manifest, max_waiting=2)
    for name in "ab":
        engine.submit(name, [1, 2], GREEDY)
    assert engine.generate([3], GREEDY)[0].token_ids == reference_greedy(manifest, [3], 20)
    run_checked(engine)
    with pytest.raises(CapacityError, match="at most 2"):
        engine.generate([3], SamplingParams(n=3))
    assert_idle(engine)


def test_generate_checks_every_prompt_before_it_runs_one():
    engine = make_engine()
    with pytest.raises(RequestError, match="mixed"):
        engine.generate([[1], 2])
    with pytest.raises(RequestError, match="token id 97"):
        engine.generate([[1], [97]])
    with pytest.raises(UsageError, match="2 params for 1"):
        engine.generate([1], [GREEDY, GREEDY])
    assert engine.generate([]) == []
    assert engine.stats.num_steps_total == 0


def test_limits_can_be_lowered_but_not_raised():
    engine = make_engine(max_batch_tokens=3, max_sequences=2)
    engine.generate(random_prompts(5, 20), GREEDY)
    assert max(len(s.input_ids) for s in engine._executor.steps) == 3
    assert max(len(s.kv_lens) for s in engine._executor.steps) == 2
    for option in ("max_batch_tokens", "max_sequences"):
        for value in (0, 1000):
            with pytest.raises(UsageError, match=option):
                make_engine(**{option: value})


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_schedule_keeps_the_invariants_and_the_answers(data):
    groups = data.draw(
        st.lists(
            st.tuples(st.none() | st.integers(1, 12), st.sampled_from([1, 2, 4, 8])),
            min_size=1,
            max_size=3,
        )
    )
    manifest = make_manifest(
        groups=tuple(groups),
        context_length=64,
        max_tokens=data.draw(st.integers(1, 24)),
        max_sequences=data.draw(st.integers(1, 6)),
        max_logits_rows=data.draw(st.integers(1, 8)),
    )
    num_pages = [data.draw(st.integers(1, 24)) for _ in groups]
    engine = make_engine(manifest, num_pages=num_pages)
    prompts: dict[str, list[int]] = {}
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    limits: dict[str, int] = {}
    for number in range(data.draw(st.integers(1, 12))):
        name = str(number)
        prompt = data.draw(st.lists(st.integers(1, 96), min_size=1, max_size=40))
        limits[name] = data.draw(st.integers(1, 20))
        scored = data.draw(st.none() | st.just(1))
        params = SamplingParams(temperature=0, max_tokens=limits[name], prompt_logprobs=scored)
        try:
            engine.submit(name, prompt, params)
        except CapacityError:
            assert len(prompt) + 1 > engine.max_length
            continue
        prompts[name], tokens[name] = prompt, []
        for _ in range(data.draw(st.integers(0, 4))):
            collect(engine, tokens, ends)
        if data.draw(st.integers(0, 5)) == 0:
            engine.cancel(data.draw(st.sampled_from(sorted(prompts))))
            check(engine)
    steps = 0
    while engine.has_work():
        collect(engine, tokens, ends)
        steps += 1
        assert steps < 5000, "the engine makes no progress"
    for name, prompt in prompts.items():
        most = min(limits[name], engine.max_length - len(prompt))
        expected = reference_greedy(manifest, prompt, most)
        if ends[name] == "cancelled":
            expected = expected[: len(tokens[name])]
        assert tokens[name] == expected
    assert_idle(engine)


def collect(engine, tokens, ends) -> None:
    for delta in engine.step():
        tokens[delta.request_id] += delta.token_ids
        if delta.finish_reason:
            ends[delta.request_id] = delta.finish_reason
    check(engine)

"""Who computes, who waits and who is preempted, in situations made for the purpose."""

from __future__ import annotations

import numpy as np
from fake_model import check, make_engine, make_manifest, reference_greedy, reference_logits

from llmc.runtime.sampling_params import SamplingParams


def greedy(max_tokens: int, **options: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def run(engine, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, list[int]]:
    for name, (prompt, params) in requests.items():
        engine.submit(name, prompt, params)
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    while engine.has_work():
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
        check(engine)
    return tokens


def test_an_older_prefill_preempts_a_newer_decode_that_was_already_scheduled():
    # Four rows a step: the scored prompt takes one token less than that, the decode goes first.
    manifest = make_manifest(max_logits_rows=4, stop_token_ids=())
    engine = make_engine(manifest, num_pages=[11])
    prompt = list(range(1, 37))
    tokens = run(
        engine,
        {"old": (prompt, greedy(4, prompt_logprobs=0)), "new": ([1] * 2, greedy(30))},
    )
    assert tokens["old"] == reference_greedy(manifest, prompt, 4)
    assert tokens["new"] == reference_greedy(manifest, [1] * 2, 30)
    assert engine.stats.num_preemptions_total > 0
    # The older one was never recomputed.
    positions = np.concatenate([s.positions for s in engine._executor.steps])
    assert (positions == 35).sum() == 1


def test_every_running_sequence_gets_a_token_in_every_step():
    for limits in ({"max_tokens": 3}, {"max_logits_rows": 3}, {"max_sequences": 3}):
        manifest = make_manifest(**limits, stop_token_ids=())
        engine = make_engine(manifest)
        for i in range(6):
            engine.submit(str(i), [i + 1], greedy(5))
        most = 0
        while engine.has_work():
            engine.step()
            assert engine.stats.num_running <= 3
            most = max(most, len(engine._executor.steps[-1].kv_lens))
        assert most == 3


def test_a_newcomer_waits_while_it_would_take_the_page_the_next_token_needs():
    engine = make_engine(make_manifest(stop_token_ids=()), num_pages=[4])
    engine.submit("old", [1] * 3, greedy(5))
    engine.step()
    engine.submit("new", [2] * 12, greedy(2))
    engine.step()  # three pages are free, but the old one will need one of them
    assert engine.stats.num_waiting == 1
    while engine.has_work():
        engine.step()
        check(engine)
    assert engine.stats.num_preemptions_total == 0


def test_a_prompt_preempted_while_it_is_scored_is_scored_once():
    manifest = make_manifest(max_logits_rows=4, stop_token_ids=())
    engine = make_engine(manifest, num_pages=[11])
    prompt = list(range(1, 37))
    engine.submit("old", [1] * 4, greedy(30))
    engine.submit("scored", prompt, greedy(2, prompt_logprobs=0))
    scored = None
    partly = False
    while engine.has_work():
        for delta in engine.step():
            scored = delta.prompt_logprobs or scored
        check(engine)
        partly |= any(s.num_scored_tokens for s in engine._scheduler.waiting)
    assert partly
    assert scored is not None
    for i, entry in enumerate(scored[1:], 1):
        logits = reference_logits(manifest, prompt[:i]).astype(np.float64)
        # float32 logits, float64 sum: the error is that of exp in float32.
        assert abs(entry.logprob - (logits[prompt[i]] - np.log(np.exp(logits).sum()))) < 1e-5


def test_logits_find_a_row_while_as_many_sequences_run_as_can():
    manifest = make_manifest(stop_token_ids=(), max_sequences=2)
    engine = make_engine(manifest)
    for name in "ab":
        engine.submit(name, [1, 2], greedy(5))
    engine.step()
    assert engine.stats.num_running == 2
    np.testing.assert_array_equal(engine.logits([5])[0], reference_logits(manifest, [5]))


def test_logits_of_a_long_text_need_a_window_of_pages_only():
    manifest = make_manifest(groups=((8, 4),))
    engine = make_engine(manifest, num_pages=[6])
    tokens = [1 + i % 90 for i in range(200)]
    logits = engine.logits(tokens, chunk_tokens=8)
    np.testing.assert_array_equal(logits[-1], reference_logits(manifest, tokens))


def test_a_sequence_too_large_for_what_is_free_now_waits_its_turn():
    manifest = make_manifest(stop_token_ids=())
    engine = make_engine(manifest, num_pages=[10])
    tokens = run(
        engine,
        {
            "a": ([1] * 20, greedy(4)),
            "b": ([2] * 36, greedy(4)),
            "c": ([3], greedy(4)),
        },
    )
    firsts = [s.input_ids[0] for s in engine._executor.steps]
    assert firsts.index(3) > firsts.index(2)  # first come, first served
    assert tokens["b"] == reference_greedy(manifest, [2] * 36, 4)

"""Tokens that the device chooses: which rows, with what numbers, and what comes of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from fake_model import FakeExecutor, check, make_engine, make_manifest, reference_greedy

from llmc.runtime.engine import Engine
from llmc.runtime.sampler import TokenSampler
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.step import Draws, StepInputs, StepOutput

MANIFEST = make_manifest(stop_token_ids=())
GREEDY = SamplingParams(max_tokens=12, temperature=0)
SAMPLED = SamplingParams(max_tokens=12, temperature=1.5, seed=3)
# What needs the logits of a row.
ON_HOST = [
    {"logprobs": 0},
    {"prompt_logprobs": 1},
    {"logit_bias": {5: 2.0}},
    {"frequency_penalty": 0.5},
    {"presence_penalty": 0.5},
    {"repetition_penalty": 1.2},
]


class ChoosingExecutor(FakeExecutor):
    """The toy on a device that chooses tokens: the likeliest, or by the row's first number."""

    chooses = True

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.draws: list[Draws | None] = []

    def step(self, inputs: StepInputs) -> np.ndarray:
        self.draws.append(None)
        return super().step(inputs)

    def step_and_choose(self, inputs: StepInputs, draws: Draws) -> StepOutput:
        logits = super().step(inputs)
        self.draws.append(draws)
        count = len(draws.rows)
        assert draws.rows.dtype == draws.top_k.dtype == np.int32
        assert draws.settings.dtype == np.float32
        assert (draws.top_k.shape, draws.settings.shape) == ((count,), (count, 5))
        assert (np.diff(draws.rows) > 0).all()
        token_ids = np.full(len(logits), -1, np.int32)
        for row, top_k, settings in zip(draws.rows, draws.top_k, draws.settings, strict=True):
            if not np.isfinite(logits[row]).all():
                continue
            scale, _, _, part, place = settings
            assert 0 <= part < 1
            assert 0 <= place < 1
            weights = np.exp((logits[row].astype(np.float64) - logits[row].max()) * scale)
            at = np.searchsorted(np.cumsum(weights), part * weights.sum(), side="right")
            token_ids[row] = logits[row].argmax() if top_k == 1 else at
        return StepOutput(token_ids=token_ids, logits=logits[token_ids < 0])


class AheadExecutor(ChoosingExecutor):
    """The same on a device that computes while the host does: a step's output is read late."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self._chosen = np.zeros(0, np.int32)  # of the step begun last
        self._waiting: list[list[StepOutput]] = []
        self.num_ahead = 0

    def begin(
        self, inputs: StepInputs, draws: Draws, chosen: np.ndarray | None = None
    ) -> Callable[[], StepOutput]:
        assert len(self._waiting) <= 1, "two steps are under way"
        if chosen is not None:
            self.num_ahead += 1
            assert chosen.shape == inputs.input_ids.shape
            assert not inputs.input_ids.any()  # the host does not know them
            ids = np.maximum(self._chosen[chosen], 0)
            inputs = dataclasses.replace(inputs, input_ids=ids)
            [before] = self._waiting
            spoiled = np.full_like(before[0].logits, np.nan)
            before[0] = StepOutput(token_ids=before[0].token_ids, logits=spoiled)
        output = [self.step_and_choose(inputs, draws)]
        self._chosen = output[0].token_ids[draws.rows]
        self._waiting.append(output)

        def wait() -> StepOutput:
            assert self._waiting.pop(0) is output, "not in the order of the steps"
            return output[0]

        return wait


def choosing_engine(num_pages: int = 512, **options: int) -> Engine:
    pages = [num_pages]
    executor = KIND(MANIFEST, pages)
    return Engine.from_parts(MANIFEST, executor, num_pages=pages, **options)


KIND = ChoosingExecutor


@pytest.fixture(autouse=True, params=[ChoosingExecutor, AheadExecutor])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "KIND", request.param)


def on_device(engine: Engine) -> int:
    """Tokens that the device chose."""
    return sum(len(draws.rows) for draws in engine._executor.draws if draws is not None)


def with_(params: SamplingParams, **changes: object) -> SamplingParams:
    fields = {name: getattr(params, name) for name in SamplingParams.__slots__}
    return SamplingParams(**{**fields, **changes})


def test_greedy_tokens_are_the_hosts_and_no_logits_come():
    engine = choosing_engine()
    prompts = [[1, 2, 3], list(range(1, 60)), [7]]
    outputs = engine.generate(prompts, GREEDY)
    assert [o.token_ids for o in outputs] == [reference_greedy(MANIFEST, p, 12) for p in prompts]
    assert on_device(engine) == 3 * 12
    assert {d.function for d in engine._executor.draws if d is not None} == {"choose_largest"}
    check(engine)


@pytest.mark.parametrize("options", ON_HOST, ids=lambda o: next(iter(o)))
def test_what_needs_logits_stays_on_the_host_beside_others(options):
    for params in (GREEDY, SAMPLED):
        alone = make_engine(MANIFEST).generate([4, 5], with_(params, **options))
        engine = choosing_engine()
        special, plain = engine.generate([[4, 5], [6]], [with_(params, **options), GREEDY])
        assert special.token_ids == alone[0].token_ids
        assert special.logprobs == alone[0].logprobs
        assert special.prompt_logprobs == alone[0].prompt_logprobs
        assert plain.token_ids == reference_greedy(MANIFEST, [6], 12)
        assert on_device(engine) == 12  # the plain one's


def test_stop_tokens_are_hidden_by_the_host_until_min_tokens():
    engine = choosing_engine()
    params = with_(SAMPLED, min_tokens=4, stop_token_ids=[1, 2, 3])
    engine.generate([8, 9], params)
    first = [draws is None for draws in engine._executor.draws]
    assert first == [True] * 4 + [False] * (len(first) - 4)


def test_a_seeds_tokens_do_not_depend_on_the_batch():
    params = [with_(SAMPLED, seed=i) for i in range(6)]
    prompts = [[i, i + 1] for i in range(6)]
    alone = [
        choosing_engine().generate([p], q)[0].token_ids
        for p, q in zip(prompts, params, strict=True)
    ]
    engine = choosing_engine()
    mixed = engine.generate([*prompts, [1, 2]], [*params, with_(GREEDY, logprobs=1)])
    assert [o.token_ids for o in mixed[:6]] == alone
    few_pages = choosing_engine(num_pages=12)
    again = few_pages.generate(prompts, params)
    assert few_pages.stats.num_preemptions_total > 0
    assert [o.token_ids for o in again] == alone
    assert len({tuple(tokens) for tokens in alone}) == 6


def test_a_row_that_the_device_gives_back_ends_its_own_sequence_only():
    engine = choosing_engine()
    engine._executor.spoil_token = 96
    for params in (GREEDY, SAMPLED):
        outputs = engine.generate([[1, 96], [2, 3], [96]], [params, GREEDY, params])
        assert [o.finish_reason for o in outputs] == ["error", "length", "error"]
        assert outputs[1].token_ids == reference_greedy(MANIFEST, [2, 3], 12)
    check(engine)


def test_log_probabilities_of_a_text_come_beside_chosen_tokens():
    engine = choosing_engine()
    engine.submit("a", [1, 2], GREEDY)
    engine.step()
    scored = engine.logits([5, 6, 7])
    np.testing.assert_array_equal(scored, make_engine(MANIFEST).logits([5, 6, 7]))


def sampler(params: SamplingParams) -> TokenSampler:
    return TokenSampler(params, np.array([1], np.int32), index=0, stop_ids=())


def test_a_draws_settings_are_the_parameters():
    draw = sampler(SamplingParams(temperature=0.5, top_k=40, top_p=0.9, min_p=0.05)).draw()
    assert draw is not None
    top_k, (scale, top_p, farthest, _, _) = draw
    assert (top_k, scale, top_p) == (40, 2.0, 0.9)
    assert math.exp(-farthest) == pytest.approx(0.05)
    assert sampler(SamplingParams(temperature=0)).draw() == (1, (1.0, 1.0, 1e30, 0.0, 0.0))


def draws_of(*params: SamplingParams) -> Draws:
    top_k, settings = zip(*(sampler(p).draw() for p in params), strict=True)
    rows = np.arange(len(params), dtype=np.int32)
    return Draws(rows=rows, top_k=np.array(top_k), settings=np.array(settings))


def test_the_search_for_limits_is_asked_for_only_where_there_are_any():
    greedy, plain = SamplingParams(temperature=0), SamplingParams(min_p=0.1)
    assert draws_of(greedy, greedy).function == "choose_largest"
    assert draws_of(greedy, plain).function == "choose_drawn"
    assert draws_of(plain, SamplingParams(top_k=5)).function == "choose_limited"
    assert draws_of(greedy, SamplingParams(top_p=0.9)).function == "choose_limited"
    assert draws_of(plain, SamplingParams(top_k=1, top_p=0.9)).function == "choose_drawn"


def test_both_numbers_of_a_draw_are_uniform_and_independent():
    one = sampler(SamplingParams(seed=1))
    pairs = np.array([one.draw()[1][3:] for _ in range(4000)], np.float32)
    assert pairs.min() >= 0
    assert pairs.max() < 1
    counts, *_ = np.histogram2d(*pairs.T, bins=8, range=[[0, 1], [0, 1]])
    # 64 cells of 62.5 on average: chi-square's mean is 63, its deviation 11.
    assert ((counts - 62.5) ** 2 / 62.5).sum() < 63 + 5 * 11


def test_a_draw_takes_one_number_of_the_stream_as_a_sampled_token_does():
    logits = np.zeros(9, np.float32)
    first, second = sampler(SamplingParams(seed=5)), sampler(SamplingParams(seed=5))
    first.sample(logits)
    second.draw()
    assert first.draw() == second.draw()


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setitem(globals(), "KIND", AheadExecutor)
    return choosing_engine()


def test_decodes_begin_before_the_host_knows_their_tokens(ahead):
    [output] = ahead.generate([[1, 2, 3]], GREEDY)
    assert output.token_ids == reference_greedy(MANIFEST, [1, 2, 3], 12)
    assert ahead._executor.num_ahead == 11  # all but the prompt's
    assert ahead.stats.num_steps_total == 12  # none in vain


def test_sequences_of_different_lengths_leave_a_batch_that_runs_ahead(ahead):
    lengths = [3, 9, 5, 9, 1]
    outputs = ahead.generate(
        [[i, 7] for i in range(5)], [with_(GREEDY, max_tokens=n) for n in lengths]
    )
    for i, (output, length) in enumerate(zip(outputs, lengths, strict=True)):
        assert output.token_ids == reference_greedy(MANIFEST, [i, 7], length)
    assert ahead._executor.num_ahead == 8
    check(ahead)


def test_a_stop_token_is_the_last_though_the_next_step_has_begun(ahead):
    tokens = reference_greedy(MANIFEST, [4], 12)
    stop = with_(GREEDY, stop_token_ids=[tokens[5]])
    stopped, plain = ahead.generate([[4], [5]], [stop, GREEDY])
    assert stopped.token_ids == tokens[: tokens.index(tokens[5]) + 1]
    assert plain.token_ids == reference_greedy(MANIFEST, [5], 12)
    check(ahead)


def test_whoever_comes_or_goes_while_a_step_is_under_way_disturbs_nobody(ahead):
    ahead.submit("a", [1, 2], GREEDY)
    ahead.submit("b", [3], GREEDY)
    found: dict[str, list[int]] = {}

    def step() -> None:
        for delta in ahead.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
        check(ahead)

    for _ in range(4):
        step()
    assert ahead._begun is not None
    ahead.cancel("a")
    ahead.submit("c", [9] * 40, GREEDY)
    np.testing.assert_array_equal(ahead.logits([5, 6, 7]), make_engine(MANIFEST).logits([5, 6, 7]))
    while ahead.has_work():
        step()
    assert found["a"] == reference_greedy(MANIFEST, [1, 2], 4)
    assert found["b"] == reference_greedy(MANIFEST, [3], 12)
    assert found["c"] == reference_greedy(MANIFEST, [9] * 40, 12)


def test_a_step_for_nobody_is_forgotten(ahead):
    ahead.submit("a", [1, 2], GREEDY)
    ahead.step()
    ahead.step()
    ahead.cancel("a")
    [last] = ahead.step()
    assert last.finish_reason == "cancelled"
    assert ahead.generate([[3]], GREEDY)[0].token_ids == reference_greedy(MANIFEST, [3], 12)


def test_a_device_that_fails_ahead_ends_the_running_and_the_engine_goes_on(ahead):
    ahead.submit("a", [1, 2], GREEDY)
    ahead.step()
    ahead._executor.fail_next = RuntimeError("lost")
    assert [d.finish_reason for d in ahead.step()] == ["error"]
    ahead._executor._waiting.clear()
    assert ahead.generate([[3]], GREEDY)[0].token_ids == reference_greedy(MANIFEST, [3], 12)
    check(ahead)

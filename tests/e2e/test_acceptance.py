"""The demo against transformers: tokens, logits and perplexity."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from demo_reference import DemoReference
from greedy import NEAR_TIE, Answer, assert_same, greedy
from random_models import DEMO

from llmc.runtime.engine import Engine

ROOT = Path(__file__).parents[2]
GREEDY = json.loads((Path(__file__).parent / "data" / "smollm2_greedy.json").read_text())["prompts"]
MAX_TOKENS = 64
TEXTS = (
    "The capital of Norway is",
    "Once upon a time there was a king who",
    "def quicksort(items):\n",
    "In 1969 the first",
    "To make bread you need flour, water,",
    "Q: What is 17 + 25?\nA:",
    "Photosynthesis is the process by which",
    '{"name": "Ada", "born": 1815, "',
    "The three laws of thermodynamics are:\n1.",
    "SELECT name, age FROM",
    "Dear Sir or Madam,\n\nI am writing to",
    "El perro come",
    "Roses are red, violets are",
    "import numpy as np\n\nx = np.",
    "A",
)


@pytest.fixture(scope="module")
def reference() -> DemoReference:
    return DemoReference(DEMO)


@pytest.fixture(scope="module")
def text_windows(demo_keep: Path) -> list[list[int]]:
    """Four windows of 512 tokens of a text that ships with the system, or with this project."""
    candidates = (Path("/usr/share/common-licenses/GPL-3"), ROOT / "LICENSE")
    text = next(path for path in candidates if path.is_file()).read_text()
    ids = Engine(demo_keep).tokenizer.encode(text)
    return [ids[start : start + 512] for start in range(0, 2048, 512)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_kept_blocks_give_the_reference_s_answers(demo_keep: Path) -> None:
    """Activations of 8 bits where the CPU multiplies bytes: tokens agree until logits are close."""
    engine = Engine(demo_keep)
    for prompt in GREEDY:
        assert engine.tokenizer.encode(prompt["text"]) == prompt["ids"]
        [answer] = greedy(engine, [prompt["ids"]], max_tokens=MAX_TOKENS)
        close = [i for i, margin in enumerate(prompt["margins"]) if margin < 0.6]
        certain = min([*close, len(prompt["greedy_ids"])])
        assert answer.token_ids[:certain] == prompt["greedy_ids"][:certain]


@pytest.mark.slow
def test_float32_gives_the_tokens_and_logits_of_transformers(
    demo_f32: Path, reference: DemoReference, record_testsuite_property
) -> None:
    engine = Engine(demo_f32)
    prompts = [prompt["ids"] for prompt in GREEDY]
    prompts += [engine.tokenizer.encode(text) for text in TEXTS]
    assert len(prompts) == 20
    expected = [reference.greedy(prompt, max_tokens=MAX_TOKENS) for prompt in prompts]
    # Both went through prefill and decode here; below, through one prefill each.
    assert_same(greedy(engine, prompts, max_tokens=MAX_TOKENS), expected, least_certain=0.95)
    num_compared, largest = 0, 0.0
    for prompt, answer in zip(prompts, expected, strict=True):
        ids = prompt + answer.token_ids
        theirs, ours = reference.logits(ids), engine.logits(ids)
        # Sums of up to 1,536 products in another order, 30 layers deep; logits reach 35.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3)
        best = np.sort(theirs, axis=1)[:, -2:]
        certain = best[:, 1] - best[:, 0] > NEAR_TIE
        assert (ours.argmax(axis=1) == theirs.argmax(axis=1))[certain].all()
        num_compared += int(certain.sum())
        largest = max(largest, float(np.abs(ours - theirs).max()))
    record_testsuite_property("demo_f32_max_abs_logit", largest)
    assert num_compared > 0.99 * sum(len(p) + MAX_TOKENS for p in prompts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("artifact", "max_mean", "max_ratio"),
    # Perplexity of 2,044 tokens moves by up to a percent with any rounding of activations.
    [("demo_f32", 2e-4, 1e-4), ("demo_keep_a16", 0.02, 5e-3), ("demo_keep", 0.06, 1.5e-2)],
    ids=["f32", "keep-a16", "keep"],
)
def test_a_text_is_as_likely_as_under_transformers(
    request: pytest.FixtureRequest,
    reference: DemoReference,
    text_windows: list[list[int]],
    artifact: str,
    max_mean: float,
    max_ratio: float,
    record_testsuite_property,
) -> None:
    engine = Engine(request.getfixturevalue(artifact))
    differences, ours_nll, theirs_nll = [], [], []
    for ids in text_windows:
        theirs, ours = log_softmax(reference.logits(ids)), log_softmax(engine.logits(ids))
        rows, top = np.arange(len(ids)), theirs.argmax(axis=1)
        differences.append(np.abs(ours[rows, top] - theirs[rows, top]))
        following = np.array(ids[1:])
        ours_nll.append(-ours[rows[:-1], following])
        theirs_nll.append(-theirs[rows[:-1], following])
    mean = float(np.mean(differences))
    ratio = float(np.exp(np.mean(ours_nll) - np.mean(theirs_nll)))
    record_testsuite_property(f"{artifact}_mean_abs", mean)
    record_testsuite_property(f"{artifact}_max_abs", float(np.max(differences)))
    record_testsuite_property(f"{artifact}_perplexity_ratio", ratio)
    assert mean <= max_mean
    assert abs(ratio - 1) <= max_ratio


@pytest.mark.slow
def test_the_reference_s_recorded_answers_are_those_of_transformers(
    reference: DemoReference,
) -> None:
    """Guards the data that the quick test above relies on."""
    for prompt in GREEDY:
        expected = Answer(prompt["greedy_ids"], prompt["margins"])
        found = reference.greedy(prompt["ids"], max_tokens=len(expected.token_ids))
        assert_same([found], [expected], least_certain=1.0)

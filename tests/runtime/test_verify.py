"""Replaying a reference: right numbers pass, wrong, missing and damaged ones do not."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

from toy_artifact import toy_manifest, toy_reference, write_artifact

from llmc.errors import ArtifactError, VerifyError
from llmc.reference import Reference, ReferencePrompt
from llmc.runtime.verify import compare_rows, verify


class ToyEngine:
    """Gives the toy's logits; records the chunks it was asked for."""

    def __init__(self, *, spoil: str | None = None) -> None:
        from toy_artifact import reference_logits

        self.manifest = toy_manifest()
        self.chunks: list[int | None] = []
        self._logits = reference_logits
        self._spoil = spoil

    def logits(self, token_ids: list[int], *, chunk_tokens: int | None = None) -> np.ndarray:
        self.chunks.append(chunk_tokens)
        rows = [self._logits(self.manifest, token_ids[: i + 1]) for i in range(len(token_ids))]
        logits = np.stack(rows)
        if self._spoil == "nan":
            logits[3, 17] = np.nan
        elif self._spoil == "one entry point" and chunk_tokens == 1:
            logits[:, ::2] += 0.5
        elif self._spoil == "infinite":
            logits[3, 17] = np.inf
        return logits


def write(tmp_path: Path, reference: Reference) -> Path:
    write_artifact(tmp_path / "toy", reference=reference)
    return tmp_path / "toy"


def test_right_numbers_pass_through_every_entry_point(tmp_path: Path) -> None:
    engine = ToyEngine()
    report = verify(write(tmp_path, toy_reference(toy_manifest())), engine=engine)
    assert report.passed
    report.raise_if_failed()
    assert engine.chunks == [1, 64]
    assert [p.entry_point for p in report.prompts] == ["step_1", "step"]
    assert report.total.num_positions == 6
    assert report.total.max_abs < 1e-6
    assert report.total.kl < 1e-9
    assert report.total.top1_agreement == 1.0
    # The original weights' log-probabilities of the toy lie 0.25 above.
    assert report.quality.mean_abs == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("spoil", ["nan", "infinite", "one entry point"])
def test_wrong_numbers_fail(tmp_path: Path, spoil: str) -> None:
    report = verify(write(tmp_path, toy_reference(toy_manifest())), engine=ToyEngine(spoil=spoil))
    assert not report.passed
    with pytest.raises(VerifyError, match=r"logits|difference"):
        report.raise_if_failed()
    json.dumps(report.to_json(), allow_nan=False)  # what is not finite became null
    good = {p.entry_point: math.isfinite(p.figures.mean_abs) for p in report.prompts}
    assert good["step"] is (spoil == "one entry point")


def test_what_has_no_reference_does_not_pass(tmp_path: Path) -> None:
    reference = Reference(made=False, reason="asked not to")
    report = verify(write(tmp_path, reference), engine=ToyEngine())
    assert not report.made
    with pytest.raises(VerifyError, match="asked not to"):
        report.raise_if_failed()


def test_the_divergence_is_that_of_its_definition() -> None:
    """KL over the listed tokens and one bucket for the rest, against a direct computation."""
    rng = np.random.default_rng(3)
    ours = rng.normal(size=(2, 30)).astype(np.float32) * 2
    theirs = ours + rng.normal(size=(2, 30)).astype(np.float32) * 0.3
    log_theirs = theirs - np.log(np.exp(theirs).sum(1, keepdims=True))
    ids = np.argsort(-log_theirs, axis=1)[:, :5]
    expected = np.take_along_axis(log_theirs, ids, 1).tolist()
    prompt = ReferencePrompt(
        token_ids=[0, 1], positions=[0, 1], top_ids=ids.tolist(), top_logprobs=expected
    )
    rows = compare_rows(ours, prompt, expected)
    for row in range(2):
        p = np.exp(log_theirs[row].astype(float))
        q = np.exp(ours[row].astype(float))
        q /= q.sum()
        rest = np.delete(np.arange(30), ids[row])
        p5 = np.append(p[ids[row]], p[rest].sum())
        q5 = np.append(q[ids[row]], q[rest].sum())
        assert rows[row, 0] == pytest.approx(abs(np.log(p5[0] / q5[0])), rel=1e-4)
        assert rows[row, 1] == pytest.approx((p5 * np.log(p5 / q5)).sum(), rel=1e-3)
        assert rows[row, 2] == (q.argmax() == ids[row, 0])


def test_a_reference_survives_writing_and_reading() -> None:
    reference = toy_reference(toy_manifest())
    assert Reference.from_json(reference.to_json()) == reference


def _changed(**changes: object) -> str:
    reference = toy_reference(toy_manifest())
    prompt = dataclasses.replace(reference.prompts[0], **changes)
    return dataclasses.replace(reference, prompts=[prompt]).to_json()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not JSON"),
        ("[]", "no schema_version"),
        ('{"schema_version": 2, "made": true}', "upgrade llmc"),
        ('{"schema_version": 1}', "'made'"),
        ('{"schema_version": 1, "made": 1}', "'made'"),
        ('{"schema_version": 1, "made": true}', "prompts is empty"),
        ('{"schema_version": 1, "made": false, "extra": 1}', "'extra'"),
        ('{"schema_version": 1, "made": NaN}', "NaN"),
        (_changed(positions=[1, 3, 7]), "position 7 of 7"),
        (_changed(positions=[1, 3]), "2 rows"),
        (_changed(positions=[]), "positions is empty"),
        (_changed(top_logprobs=[[0.0], [0.0], [0.0]]), "top_logprobs"),
        (_changed(top_ids=[["a"]]), "'prompts[0].top_ids[0][0]'"),
    ],
)
def test_a_damaged_reference_is_named(text: str, named: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Reference.from_json(text)
    assert named in str(caught.value)


@pytest.mark.parametrize("ids", [[5, 9, 33, 80, 2, 7, 99_999], [-1, 9, 33, 80, 2, 7, 5]])
def test_a_token_outside_the_vocabulary_does_not_reach_the_device(tmp_path: Path, ids) -> None:
    engine = ToyEngine()
    write(tmp_path, toy_reference(toy_manifest()))
    (tmp_path / "toy" / "reference.json").write_text(_changed(token_ids=ids))
    with pytest.raises(ArtifactError, match="names token"):
        verify(tmp_path / "toy", engine=engine)
    assert engine.chunks == []

"""Replays `reference.json`: the artifact proves its numbers on the device it is served from.

Every prompt runs once per entry point, in chunks that make the engine choose it, because each entry
point has kernels of its own. No torch is needed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmc.artifact import REFERENCE_FILE, EntryPoint, Manifest, VerifyTolerance
from llmc.errors import ArtifactError, VerifyError
from llmc.reference import Reference, ReferencePrompt

Float64 = npt.NDArray[np.float64]


class LogitsSource(Protocol):
    """What verify needs of an engine."""

    @property
    def manifest(self) -> Manifest:
        """Of the artifact that is verified."""

    def logits(
        self, token_ids: list[int], *, chunk_tokens: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Logits `[T, V]` float32 after each token, computed in chunks of `chunk_tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Differences of log-probabilities (natural log) over positions; infinite where NaN was met."""

    num_positions: int
    mean_abs: float  # of the reference's top token
    max_abs: float  # of the reference's top token
    kl: float  # mean Kullback-Leibler divergence over the top k and the lumped rest, nats
    top1_agreement: float  # share of positions with the same most likely token


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """One prompt through one entry point."""

    prompt: int
    entry_point: str
    figures: Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `llmc verify` found."""

    made: bool  # False: the artifact carries no reference, nothing was compared
    passed: bool
    reason: str | None  # why not, None if passed
    tolerance: VerifyTolerance
    prompts: list[PromptReport]
    total: Figures | None
    quality: Figures | None  # against the original weights: the price of the quantization

    def raise_if_failed(self) -> None:
        """Raises VerifyError unless the artifact passed."""
        if not self.made:
            raise VerifyError(
                f"nothing to verify: {self.reason}", hint="compile again with a reference"
            )
        if not self.passed:
            raise VerifyError(
                self.reason or "the log-probabilities differ",
                hint="the artifact computes wrong numbers on this device: do not serve it",
            )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; numbers that are not finite become null."""
        data: dict[str, Any] = _finite(dataclasses.asdict(self))
        return data


def verify(
    directory: Path, *, device: str | None = None, engine: LogitsSource | None = None
) -> VerifyReport:
    """Compares the artifact's log-probabilities on this device with its `reference.json`.

    `engine` is used where given; otherwise one is opened on `device`, or on the first of the kind
    that the artifact was compiled for. Raises ArtifactError where the artifact or its reference is
    damaged; wrong numbers are reported, not raised.
    """
    manifest = engine.manifest if engine else Manifest.load(directory)
    if REFERENCE_FILE in manifest.files:
        manifest.check_file(directory, REFERENCE_FILE)
    reference = Reference.load(directory)
    if not reference.made:
        return VerifyReport(
            made=False,
            passed=False,
            reason=reference.reason or "the reference was not made",
            tolerance=manifest.verify,
            prompts=[],
            total=None,
            quality=None,
        )
    _check_ids(reference, manifest)
    if engine is None:
        from llmc.runtime.engine import Engine

        longest = max(len(prompt.token_ids) for prompt in reference.prompts)
        engine = Engine(directory, device=device, kv_cache_tokens=max(longest + 1, 256))
    return _replay(reference, engine)


def _replay(reference: Reference, engine: LogitsSource) -> VerifyReport:
    manifest = engine.manifest
    reports: list[PromptReport] = []
    rows: list[Float64] = []
    quality_rows: list[Float64] = []
    for index, prompt in enumerate(reference.prompts):
        for entry_point in _entry_points_of(manifest, len(prompt.token_ids)):
            logits = engine.logits(prompt.token_ids, chunk_tokens=entry_point.max_tokens)
            compared = compare_rows(logits, prompt, prompt.top_logprobs)
            rows.append(compared)
            reports.append(
                PromptReport(
                    prompt=index, entry_point=entry_point.name, figures=_summarize(compared)
                )
            )
            if prompt.original_top_logprobs is not None:
                quality_rows.append(compare_rows(logits, prompt, prompt.original_top_logprobs))
    total = _summarize(np.concatenate(rows))
    reason = _failure(total, manifest.verify)
    return VerifyReport(
        made=True,
        passed=reason is None,
        reason=reason,
        tolerance=manifest.verify,
        prompts=reports,
        total=total,
        quality=_summarize(np.concatenate(quality_rows)) if quality_rows else None,
    )


def _entry_points_of(manifest: Manifest, num_tokens: int) -> list[EntryPoint]:
    """Every entry point that a prompt of `num_tokens` can be made to use."""
    smaller = [e for e in manifest.entry_points if e.max_tokens < num_tokens]
    larger = [e for e in manifest.entry_points if e.max_tokens >= num_tokens]
    return smaller + larger[:1]


def compare_rows(
    logits: npt.NDArray[np.float32], prompt: ReferencePrompt, expected: list[list[float]]
) -> Float64:
    """Per scored position: |difference| of the top token, KL over the top k, same best (0 or 1).

    logits `[T, V]`, expected `[R, k]` log-probabilities at `prompt.top_ids`; gives `[R, 3]`.
    """
    picked = logits[np.asarray(prompt.positions)].astype(np.float64)
    finite = np.isfinite(picked).all(axis=1)
    with np.errstate(invalid="ignore"):
        shifted = picked - picked.max(axis=1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    ids = np.asarray(prompt.top_ids)
    ours = np.take_along_axis(log_probs, ids, axis=1)
    reference = np.asarray(expected, dtype=np.float64)
    result = np.stack(
        [
            np.abs(ours[:, 0] - reference[:, 0]),
            _kl(reference, ours),
            (picked.argmax(axis=1) == ids[:, 0]).astype(np.float64),
        ],
        axis=1,
    )
    result[~finite] = (np.inf, np.inf, 0.0)
    return result


def _kl(reference: Float64, ours: Float64) -> Float64:
    """KL(reference ‖ ours) `[R]` over `[R, k]` listed tokens plus one bucket for all others."""
    probabilities = np.exp(reference)
    # Rounding can leave the rest a hair below zero; it then weighs nothing.
    rest = np.clip(1.0 - probabilities.sum(axis=1), 1e-12, None)
    our_rest = np.clip(1.0 - np.exp(ours).sum(axis=1), 1e-12, None)
    listed = (probabilities * (reference - ours)).sum(axis=1)
    kl: Float64 = np.maximum(listed + rest * (np.log(rest) - np.log(our_rest)), 0.0)
    return kl


def _summarize(rows: Float64) -> Figures:
    return Figures(
        num_positions=len(rows),
        mean_abs=float(rows[:, 0].mean()),
        max_abs=float(rows[:, 0].max()),
        kl=float(rows[:, 1].mean()),
        top1_agreement=float(rows[:, 2].mean()),
    )


def _failure(total: Figures, tolerance: VerifyTolerance) -> str | None:
    if not math.isfinite(total.mean_abs):
        return "the model gave NaN or infinite logits"
    for name, value, limit in (
        ("mean", total.mean_abs, tolerance.max_mean_abs),
        ("largest", total.max_abs, tolerance.max_abs),
    ):
        if value > limit:
            return (
                f"the {name} difference of log-probabilities is {value:.3g}, allowed is {limit:.3g}"
            )
    return None


def _check_ids(reference: Reference, manifest: Manifest) -> None:
    """An id outside the vocabulary must not reach the device."""
    for prompt in reference.prompts:
        for ids in (prompt.token_ids, *prompt.top_ids):
            for token_id in ids:
                if not 0 <= token_id < manifest.model.vocab_size:
                    raise ArtifactError(
                        f"reference.json names token {token_id}, "
                        f"the vocabulary has {manifest.model.vocab_size}"
                    )
        if len(prompt.token_ids) > manifest.model.context_length:
            raise ArtifactError(
                f"reference.json has a prompt of {len(prompt.token_ids)} tokens, "
                f"the context length is {manifest.model.context_length}"
            )


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

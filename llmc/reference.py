"""`reference.json`: what the model itself said at compile time, for `llmc verify` to replay.

Per prompt and scored position it holds the k most likely next tokens and their log-probabilities in
float32, of the weights as they were stored (dequantized) and, where they were at hand, of the
original ones: the first decide pass or fail, the second are the price of the quantization.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from llmc.artifact import REFERENCE_FILE
from llmc.errors import ArtifactError
from llmc.strict_json import decode, load_object, read_text

REFERENCE_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferencePrompt:
    """One prompt; `R` positions are scored, each with the `k` most likely tokens, best first."""

    token_ids: list[int]
    positions: list[int]  # [R] indices into token_ids: the logits after that token
    top_ids: list[list[int]]  # [R, k]
    top_logprobs: list[list[float]]  # [R, k] of the dequantized weights, float32, natural log
    # [R, k] of the original weights at the same ids; None where they were not at hand.
    original_top_logprobs: list[list[float]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The whole of `reference.json`."""

    schema_version: int = REFERENCE_SCHEMA_VERSION
    made: bool
    reason: str | None = None  # why it was not made
    prompts: list[ReferencePrompt] = field(default_factory=list)

    def to_json(self) -> str:
        """The reference as JSON; raises ValueError on NaN or infinity."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Reference:
        """Parses and checks `text`; raises ArtifactError naming the first field that is wrong."""
        data = load_object(text, file=REFERENCE_FILE, schema_version=REFERENCE_SCHEMA_VERSION)
        reference: Reference = decode(cls, data, file=REFERENCE_FILE)
        if reference.made and not reference.prompts:
            raise ArtifactError(f"{REFERENCE_FILE}: made is true, but prompts is empty")
        for index, prompt in enumerate(reference.prompts):
            _check_prompt(prompt, f"prompts[{index}]")
        return reference

    @classmethod
    def load(cls, directory: Path) -> Reference:
        """Reads `directory/reference.json`; an artifact without one was compiled without one."""
        path = directory / REFERENCE_FILE
        if not path.is_file():
            return cls(made=False, reason=f"the artifact has no {REFERENCE_FILE}")
        return cls.from_json(read_text(path))


def _check_prompt(prompt: ReferencePrompt, where: str) -> None:
    num_tokens, num_rows = len(prompt.token_ids), len(prompt.positions)
    if not num_rows:
        raise ArtifactError(f"{REFERENCE_FILE}: {where}.positions is empty")
    for position in prompt.positions:
        if not 0 <= position < num_tokens:
            raise ArtifactError(
                f"{REFERENCE_FILE}: {where} scores position {position} of {num_tokens} tokens"
            )
    shapes = {
        "top_ids": [len(row) for row in prompt.top_ids],
        "top_logprobs": [len(row) for row in prompt.top_logprobs],
    }
    if prompt.original_top_logprobs is not None:
        shapes["original_top_logprobs"] = [len(row) for row in prompt.original_top_logprobs]
    expected = [len(prompt.top_ids[0]) if prompt.top_ids else 0] * num_rows
    for name, lengths in shapes.items():
        if lengths != expected or 0 in lengths:
            raise ArtifactError(
                f"{REFERENCE_FILE}: {where}.{name} has rows of {lengths[:4]}…, "
                f"expected {num_rows} rows of one length"
            )

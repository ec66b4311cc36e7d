"""An artifact folder around the NumPy toy of tests/runtime, with a tokenizer and a template."""

from __future__ import annotations

import dataclasses
import sys
import time
import types
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from fake_model import FakeExecutor, make_manifest, reference_logits
from text_models import byte_level_tokenizer

from llmc.artifact import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    MANIFEST_FILE,
    REFERENCE_FILE,
    TOKENIZER_FILE,
    EntryPoint,
    Manifest,
    VerifyTolerance,
    sha256_of,
)
from llmc.reference import Reference, ReferencePrompt

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
STOP_ID = 1  # `</s>` of the toy tokenizer


def toy_manifest(**changes: object) -> Manifest:
    manifest = make_manifest(
        vocab_size=byte_level_tokenizer().vocab_size,
        context_length=512,
        max_tokens=64,
        stop_token_ids=(STOP_ID,),
    )
    small = EntryPoint(
        name="step_1", max_tokens=1, max_sequences=1, max_logits_rows=1, workspace_bytes=0
    )
    manifest = dataclasses.replace(
        manifest,
        entry_points=[small, *manifest.entry_points],
        # Rounding to float32 on both sides, nothing else differs.
        verify=VerifyTolerance(max_mean_abs=1e-5, max_abs=1e-5),
    )
    return dataclasses.replace(manifest, **changes)


def toy_reference(manifest: Manifest, *, shift: float = 0.0) -> Reference:
    """What the toy says, straight from its definition; `shift` makes it wrong."""
    token_ids, top_k = [5, 9, 33, 80, 2, 7, 119], 4
    positions = [1, 3, 6]
    ids, logprobs = [], []
    for position in positions:
        logits = reference_logits(manifest, token_ids[: position + 1]).astype(np.float64)
        all_logprobs = logits - np.log(np.exp(logits).sum())
        top = np.argsort(-all_logprobs)[:top_k]
        ids.append(top.tolist())
        logprobs.append((all_logprobs[top] + shift).tolist())
    prompt = ReferencePrompt(
        token_ids=token_ids,
        positions=positions,
        top_ids=ids,
        top_logprobs=logprobs,
        original_top_logprobs=[[value + 0.25 for value in row] for row in logprobs],
    )
    return Reference(made=True, prompts=[prompt])


def write_artifact(
    directory: Path,
    *,
    reference: Reference | None = None,
    tokenizer: bool = True,
    template: bool = True,
    generation_config: str | None = None,
) -> Manifest:
    directory.mkdir(parents=True, exist_ok=True)
    manifest = toy_manifest()
    files = {"model.so": "not code: the toy's executor is Python"}
    if tokenizer:
        files[TOKENIZER_FILE] = byte_level_tokenizer()._tokenizer.to_str()
    if template:
        files[CHAT_TEMPLATE_FILE] = TEMPLATE
    if generation_config is not None:
        files[GENERATION_CONFIG_FILE] = generation_config
    if reference is not None:
        files[REFERENCE_FILE] = reference.to_json()
    for name, text in files.items():
        (directory / name).write_text(text)
    hashes = {name: sha256_of(directory / name) for name in files}
    manifest = dataclasses.replace(manifest, files=hashes)
    (directory / MANIFEST_FILE).write_text(manifest.to_json())
    return manifest


class SlowExecutor(FakeExecutor):
    """The toy with steps that take `delay_s`, so that a test can act in between."""

    delay_s = 0.0
    broken = False

    def step(self, inputs):
        time.sleep(self.delay_s)
        if self.broken:
            raise RuntimeError("the device is gone")
        return super().step(inputs)


def install_fake_executor(monkeypatch=None, *, delay_s: float = 0.0) -> None:
    """Has the loader take the toy instead of compiled code."""

    def load_executor(directory, manifest, *, num_pages, place, weights):
        executor = SlowExecutor(manifest, list(num_pages))
        executor.delay_s = delay_s
        return executor

    module = types.ModuleType("llmc.runtime.executor")
    module.load_executor = load_executor
    if monkeypatch is None:
        sys.modules["llmc.runtime.executor"] = module
    else:
        monkeypatch.setitem(sys.modules, "llmc.runtime.executor", module)


if __name__ == "__main__":  # the command line over the toy, for tests that need a process
    from llmc.cli.main import main

    install_fake_executor(delay_s=float(sys.argv.pop(1)))
    main()

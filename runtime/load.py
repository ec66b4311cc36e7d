"""Opens an artifact folder: checked first, then sized, then loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact import (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_FILE,
    Manifest,
)
from llmc.errors import ArtifactError, UsageError
from llmc.runtime.devices import Place, choose_place
from llmc.runtime.devices.cpu import num_threads
from llmc.runtime.generation_config import load_sampling_defaults
from llmc.runtime.memory import plan_num_pages, return_free_memory
from llmc.runtime.step import StepExecutor
from llmc.runtime.weights import MakeTensor, WeightFiles, random_tensors
from llmc.strict_json import read_text

if TYPE_CHECKING:
    from llmc.runtime.chat_template import ChatTemplate
    from llmc.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest step, as compiled or lowered."""

    max_batch_tokens: int
    max_sequences: int
    max_logits_rows: int

    @classmethod
    def of(
        cls, manifest: Manifest, *, max_batch_tokens: int | None, max_sequences: int | None
    ) -> Limits:
        """The manifest's limits, or the given lower ones; UsageError where they are not lower."""
        return cls(
            max_batch_tokens=_lowered(
                "max_batch_tokens", max_batch_tokens, manifest.max_batch_tokens
            ),
            max_sequences=_lowered("max_sequences", max_sequences, manifest.max_sequences),
            max_logits_rows=manifest.max_logits_rows,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """The parts of an opened artifact."""

    manifest: Manifest
    executor: StepExecutor
    num_pages: list[int]  # of each group
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    sampling_defaults: dict[str, Any]  # fields of SamplingParams that the model states


def load_model(
    directory: Path,
    *,
    device: str | None,
    kv_cache_tokens: int | None,
    max_batch_tokens: int | None,
    max_sequences: int | None,
    random_weights: bool = False,
) -> LoadedModel:
    """Opens the artifact in `directory` on `device`, or on the first of its kind.

    With `random_weights` its weight files are not read, and may be missing. ArtifactError where it
    is damaged, CapacityError where it does not fit into memory.
    """
    manifest = Manifest.load(directory)
    # Compiled artifacts are code: nothing of them is used before the hashes are right. Weights, by
    # far the largest, are read and hashed while the rest is loaded.
    weight_files = {weight.file for weight in manifest.weights}
    if not random_weights and not weight_files <= manifest.files.keys():
        raise ArtifactError(
            f"{directory} was compiled without weights",
            hint="leave out --no-weights; llmc bench --random-weights measures it as it is",
        )
    for name in manifest.files:
        if name not in weight_files:
            manifest.check_file(directory, name)
    limits = Limits.of(manifest, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences)
    place = choose_place(manifest, device)
    num_pages = plan_num_pages(
        manifest,
        kv_cache_tokens=kv_cache_tokens,
        max_sequences=limits.max_sequences,
        max_batch_tokens=limits.max_batch_tokens,
        num_threads=num_threads() if place.device.is_host else 1,
        available_bytes=place.device.available_bytes(place.index),
    )
    with ExitStack() as stack:
        weights: Callable[[MakeTensor], list[Any]] = partial(random_tensors, manifest)
        if not random_weights:
            files = WeightFiles(directory, manifest, resident=place.device.is_host)
            weights = stack.enter_context(files).tensors
        return _load_parts(directory, manifest, num_pages=num_pages, place=place, weights=weights)


def _load_parts(
    directory: Path,
    manifest: Manifest,
    *,
    num_pages: list[int],
    place: Place,
    weights: Callable[[MakeTensor], list[Any]],
) -> LoadedModel:
    # What takes long to import is imported here, while other threads read the weights.
    from llmc.runtime.executor import load_executor

    tokenizer = None
    if TOKENIZER_FILE in manifest.files:
        from llmc.runtime.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_file(directory / TOKENIZER_FILE)
        return_free_memory()  # parsing takes twice what the tokenizer keeps
    chat_template = None
    if CHAT_TEMPLATE_FILE in manifest.files:
        chat_template = _load_template(directory / CHAT_TEMPLATE_FILE, manifest, tokenizer)
    sampling_defaults = {}
    if GENERATION_CONFIG_FILE in manifest.files:
        sampling_defaults = load_sampling_defaults(directory / GENERATION_CONFIG_FILE)
    executor = load_executor(directory, manifest, num_pages=num_pages, place=place, weights=weights)
    return LoadedModel(
        manifest=manifest,
        executor=executor,
        num_pages=num_pages,
        tokenizer=tokenizer,
        chat_template=chat_template,
        sampling_defaults=sampling_defaults,
    )


def _load_template(path: Path, manifest: Manifest, tokenizer: Tokenizer | None) -> ChatTemplate:
    from llmc.runtime.chat_template import ChatTemplate

    source = read_text(path)
    special_tokens = {"bos_token": "", "eos_token": ""}
    if tokenizer is not None:
        if manifest.model.bos_token_id is not None:
            special_tokens["bos_token"] = tokenizer.token_text(manifest.model.bos_token_id)
        if manifest.model.stop_token_ids:
            special_tokens["eos_token"] = tokenizer.token_text(manifest.model.stop_token_ids[0])
    return ChatTemplate(source, special_tokens=special_tokens)


def _lowered(name: str, value: int | None, compiled: int) -> int:
    if value is None:
        return compiled
    if not 1 <= value <= compiled:
        raise UsageError(
            f"{name} is {value}, expected 1 to {compiled}",
            hint="larger steps need an artifact compiled for them",
        )
    return value

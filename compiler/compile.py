"""A compile from end to end: a model source becomes an artifact folder, or nothing at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

import llmc
from llmc import artifact
from llmc.compiler import calibration, weight_plan
from llmc.compiler.interrupt import interruptible
from llmc.compiler.new_folder import new_folder
from llmc.compiler.passes.dispatch import RULE
from llmc.compiler.passes.lift_scratch import NUM_SCRATCH
from llmc.compiler.passes.lower_attention import Caches, caches_of
from llmc.compiler.passes.plan_memory import PLANNED_BYTES, pooled_bytes
from llmc.compiler.phases import Dump, OnPhase, Timer, failing_as
from llmc.compiler.pipeline import (
    StepBounds,
    from_trace,
    graph_phases,
    lower_memory,
    lower_to_vm,
    with_sampling,
)
from llmc.compiler.reference import make_reference
from llmc.compiler.rewriter import bindings, relax_functions
from llmc.compiler.schemes import KV_DTYPES, Scheme, scheme_of
from llmc.compiler.streamed_model import Float32, Rows
from llmc.compiler.thread_scratch import ScratchMeter
from llmc.compiler.tokenizer_file import compact
from llmc.compiler.weight_plan import WeightSpec
from llmc.compiler.weights import (
    Argument,
    Grids,
    arguments,
    dequantized,
    describe,
    stored_formats,
    write_weights,
)
from llmc.errors import ImportModelError, UsageError
from llmc.models.source import ModelSource, open_source
from llmc.models.trace import Trace, trace
from llmc.targets.base import Target
from llmc.targets.registry import open_target


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileResult:
    """What was written, and how long each phase took; notes are for the user to know."""

    path: Path
    manifest: artifact.Manifest
    phases: list[tuple[str, float]]
    seconds: float
    notes: list[str]


@interruptible()
def compile_model(
    source: str | Path,
    *,
    target: str = "cpu",
    quant: str = "f32",
    out: Path | str | None = None,
    name: str | None = None,
    force: bool = False,
    dump_ir: Path | str | None = None,
    max_batch_tokens: int = 512,
    max_sequences: int = 32,
    context_length: int | None = None,
    kv: str | None = None,
    calibrate: Path | str | None = None,
    weights: bool = True,
    on_phase: OnPhase | None = None,
) -> CompileResult:
    """Compiles `source` (folder, .gguf file, demo:NAME or hub id) into the artifact folder `out`.

    `calibrate` is a UTF-8 text by which 4-bit codes are chosen. Without `weights` none are read or
    written: what comes out can be inspected, and measured with made-up ones.

    The folder appears only when it is complete. Raises ImportModelError, UnsupportedError,
    CompileError or UsageError.
    """
    timer = Timer(on_phase)
    scheme = scheme_of(quant)
    if calibrate is not None and not weights:
        raise UsageError("nothing can be calibrated without weights")
    text = None if calibrate is None else calibration.read_text(Path(calibrate), scheme)
    kv_name = kv or scheme.kv
    if kv_name not in KV_DTYPES:
        raise UsageError(
            f"unknown KV type {kv_name!r}", hint=f"choose one of {', '.join(KV_DTYPES)}"
        )
    device = open_target(target)
    scheme = scheme.resolved(target, device.narrow_products, device.lacking_formats)
    with timer.phase("open"):
        model = _open(str(source), weights)
        windows = None if text is None else calibration.windows_of(model, text)
    title = name or model.name
    _check_context(model, context_length)
    where = Path(out) if out is not None else Path("dist") / _folder_name(title, quant, target)
    with new_folder(where, force=force) as folder:
        bounds = StepBounds(
            max_tokens=max_batch_tokens,
            max_sequences=min(max_sequences, max_batch_tokens),
            max_logits_rows=min(max(max_sequences, 32), max_batch_tokens),
        )
        with timer.phase("trace"):
            traced = trace(model.config)
        length = _context_length(model, context_length)
        variants, builds = [], []
        for one in (device, *device.alternatives):
            dump = dump_ir if one is device else dump_ir and Path(dump_ir) / one.library_name
            spec = f"{one.name}:{one.level}" if device.alternatives else target
            part = f", {spec}" if device.alternatives else ""  # of the compile, in phases' names
            one_built = _build(
                model, traced, scheme, KV_DTYPES[kv_name], one, bounds, timer, part, dump
            )
            with timer.phase(f"link{part}"):
                features = one.link(one_built.executable, folder / one.library_name)
            builds.append(one_built)
            variants.append(_variant(one, spec, features))
        built = _combined(builds)
        notes: list[str] = []
        scratch = folder / "calibration"
        if windows is not None:
            with timer.phase("calibrate") as progress:
                specs = _specs(built.arguments)
                found = calibration.calibrate(model, specs, windows, scratch, progress)
                model, notes = replace(model, tensors=found.tensors), found.notes
        if weights:
            with timer.phase("weights") as progress:
                grids = write_weights(folder, built.arguments, model.tensors, device, progress)
            with timer.phase("reference"):
                _write_reference(folder, model, built.arguments, scheme, grids)
        shutil.rmtree(scratch, ignore_errors=True)
        with timer.phase("package"):
            _write_tokenizer(folder, model)
            manifest = _manifest(
                title, model, traced, scheme, device, variants, bounds, built, length
            )
            manifest = replace(manifest, files=_hashes(folder))
            # As bytes: no platform's line ends may get into what is compared byte by byte.
            (folder / artifact.MANIFEST_FILE).write_bytes(manifest.to_json().encode())
    return CompileResult(
        path=where,
        manifest=manifest,
        phases=timer.phases,
        seconds=timer.elapsed(),
        notes=notes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """What the compiler proper made."""

    executable: tvm.runtime.Executable
    arguments: list[Argument]
    caches: Caches
    workspace: dict[str, int]  # bytes, by entry point
    pooled_bytes: int  # of all functions together
    thread_bytes: int  # that kernels allocate, on each thread
    sampling: artifact.DeviceSampling | None
    kernels: list[artifact.KernelInfo]
    vocab_size: int


def _build(
    model: ModelSource,
    traced: Trace,
    scheme: Scheme,
    kv_dtype: str,
    target: Target,
    bounds: StepBounds,
    timer: Timer,
    part: str,
    dump_ir: Path | str | None,
) -> _Built:
    dump = Dump(dump_ir)
    with failing_as("import"):
        mod = from_trace(traced)
    dump.write("trace", mod)
    with target.tvm_target:
        with timer.phase(f"passes{part}") as progress:
            # Other schemes choose without it, and finding out reads a layer's weights.
            stored = stored_formats(model.tensors) if scheme.keep else {}
            phases = graph_phases(
                target, scheme.choose(stored), scheme.activations, kv_dtype, bounds
            )
            for done, (phase, apply) in enumerate(phases):
                with failing_as(phase):
                    mod = apply(mod)
                dump.write(phase, mod)
                progress((done + 1) / len(phases))
            entries = [variable.name_hint for variable, _ in relax_functions(mod)]
            _, first = next(iter(relax_functions(mod)))
            vocab_size = int(first.ret_ty.shape[1])
            wanted = arguments(list(first.params), weight_plan.weights_of(mod))
            caches = caches_of(mod)
            mod = with_sampling(mod, target, vocab_size, bounds)
        with timer.phase(f"codegen{part}"):
            with failing_as("plan"):
                planned = lower_to_vm(mod, results_at_bounds=target.lazy_memory)
            workspace = {
                name.name_hint: int(func.attrs[PLANNED_BYTES])
                for name, func in relax_functions(planned)
            }
            dump.write("planned", planned)
            with failing_as("lower"):
                lowered = lower_memory(planned)
            meter = ScratchMeter()
            executable = _codegen(lowered, target, meter)
            scratch = meter.measured(planned)
    return _Built(
        executable=executable,
        arguments=wanted,
        caches=caches,
        workspace={name: workspace.pop(name) for name in entries},
        pooled_bytes=pooled_bytes(planned) + scratch.caller,
        thread_bytes=scratch.each_thread,
        sampling=_sampling_info(workspace, bounds),
        kernels=_kernel_infos(mod, planned),
        vocab_size=vocab_size,
    )


def _variant(target: Target, spec: str, features: list[str]) -> artifact.Variant:
    return artifact.Variant(
        library=target.library_name,
        device_kind=target.device_kind,
        target=spec,
        features=features,
    )


def _combined(builds: list[_Built]) -> _Built:
    """What holds for all variants: the first's kernels, the memory of the largest."""
    first = builds[0]
    assert all(b.arguments == first.arguments and b.caches == first.caches for b in builds)
    workspace = {name: max(b.workspace[name] for b in builds) for name in first.workspace}
    sampling = max(
        (b.sampling for b in builds if b.sampling is not None),
        key=lambda s: s.workspace_bytes,
        default=None,
    )
    return replace(
        first,
        workspace=workspace,
        pooled_bytes=max(b.pooled_bytes for b in builds),
        thread_bytes=max(b.thread_bytes for b in builds),
        sampling=sampling,
    )


def _sampling_info(workspace: dict[str, int], bounds: StepBounds) -> artifact.DeviceSampling | None:
    """Of the functions that are no entry points, where there are any."""
    if not workspace:
        return None
    return artifact.DeviceSampling(
        max_rows=bounds.max_logits_rows, workspace_bytes=max(workspace.values())
    )


def _codegen(
    mod: tvm.IRModule, target: Target, *instruments: ScratchMeter
) -> tvm.runtime.Executable:
    with tvm.transform.PassContext(**target.pass_options, instruments=list(instruments)):
        return relax.build(mod, target=target.tvm_target, relax_pipeline=None)


def _kernel_infos(mod: tvm.IRModule, planned: tvm.IRModule) -> list[artifact.KernelInfo]:
    """Every PrimFunc with the rule that made it and how often the entry points call it; how many
    arguments are scratch is known once memory is planned.
    """
    calls: Counter[str] = Counter()
    for _, func in relax_functions(mod):
        for binding in bindings(func):
            value = binding.value
            if isinstance(value, relax.Call) and value.args:
                callee = value.args[0]
                if isinstance(callee, tvm.ir.GlobalVar):
                    calls[callee.name_hint] += 1
    return [
        artifact.KernelInfo(
            name=g.name_hint,
            rule=str(f.attrs[RULE]),
            num_calls=calls[g.name_hint],
            num_scratch=int(planned[g.name_hint].attrs.get(NUM_SCRATCH, 0)),
        )
        for g, f in mod.functions_items()
        if isinstance(f, tvm.tirx.PrimFunc)
    ]


def _manifest(
    title: str,
    model: ModelSource,
    traced: Trace,
    scheme: Scheme,
    target: Target,
    variants: list[artifact.Variant],
    bounds: StepBounds,
    built: _Built,
    context_length: int,
) -> artifact.Manifest:
    caches = [
        artifact.CacheTensor(
            name=c.name,
            layer=c.layer,
            group=c.group,
            kind="paged",
            dtype=c.dtype,
            page_shape=c.page_shape,
            page_bytes=int(np.prod(c.page_shape)) * np.dtype(c.dtype).itemsize,
        )
        for c in built.caches.tensors
    ]
    groups = [
        artifact.CacheGroup(
            name="full" if window is None else f"window_{window}",
            window=window,
            page_size=target.page_size,
        )
        for window in built.caches.windows
    ]
    entries = _entry_points(bounds, built)
    weights = describe(built.arguments)
    return artifact.Manifest(
        llmc_version=llmc.__version__,
        tvm_version=str(tvm.__version__),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=_model_info(title, model, traced, built, context_length),
        quantization=scheme.name,
        compute_dtype="float32",
        activation_dtype=scheme.activations,
        kv_dtype="bfloat16" if caches[0].dtype == "uint16" else caches[0].dtype,
        entry_points=entries,
        groups=groups,
        caches=caches,
        weights=weights,
        variants=variants,
        memory=artifact.MemoryPlan(
            weights_bytes=sum(w.num_bytes for w in weights),
            workspace_bytes=built.pooled_bytes,
            thread_bytes=built.thread_bytes,
            logits_bytes=bounds.max_logits_rows * built.vocab_size * 4,
            kv_bytes_per_token=sum(c.page_bytes for c in caches) // target.page_size,
        ),
        kernels=built.kernels,
        sampling=built.sampling,
        verify=artifact.VerifyTolerance(max_mean_abs=scheme.max_mean_abs, max_abs=scheme.max_abs),
    )


def _entry_points(bounds: StepBounds, built: _Built) -> list[artifact.EntryPoint]:
    entries = []
    for name, workspace in built.workspace.items():
        suffix = name.removeprefix("step").removeprefix("_")
        max_tokens = int(suffix) if suffix else bounds.max_tokens
        entries.append(
            artifact.EntryPoint(
                name=name,
                max_tokens=max_tokens,
                max_sequences=min(max_tokens, bounds.max_sequences),
                max_logits_rows=min(max_tokens, bounds.max_logits_rows),
                workspace_bytes=workspace,
            )
        )
    return sorted(entries, key=lambda e: e.max_tokens)


def _open(source: str, weights: bool) -> ModelSource:
    try:
        return open_source(source, weights=weights)
    except OSError as exc:
        raise ImportModelError(
            f"{exc.filename or source} cannot be read: {exc.strerror or exc}",
            hint="check the file and its permissions",
        ) from exc


def _check_context(model: ModelSource, wanted: int | None) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if wanted is not None and limit is not None and wanted > limit:
        raise UsageError(
            f"context of {wanted} tokens exceeds the model's {limit}",
            hint="positions beyond the trained ones give nonsense",
        )


def _context_length(model: ModelSource, wanted: int | None) -> int:
    """Tokens of one sequence: those asked for, or the model's own limit."""
    length = wanted or getattr(model.config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UsageError(
            f"{model.config.model_type} does not state its context length",
            hint="give --context TOKENS",
        )
    return length


def _model_info(
    title: str, model: ModelSource, traced: Trace, built: _Built, context_length: int
) -> artifact.ModelInfo:
    config = model.config
    return artifact.ModelInfo(
        name=title,
        architecture=config.model_type,
        vocab_size=built.vocab_size,
        context_length=context_length,
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        num_parameters=traced.num_parameters,
        bos_token_id=model.bos_token_id,
        stop_token_ids=model.stop_token_ids,
    )


def _specs(wanted: list[Argument]) -> dict[str, WeightSpec]:
    """How each of the model's tensors is stored."""
    return {source: argument.spec for argument in wanted for source in argument.spec.sources}


def _write_reference(
    folder: Path, model: ModelSource, wanted: list[Argument], scheme: Scheme, grids: Grids
) -> None:
    specs = _specs(wanted)

    def as_compiled(name: str) -> Float32 | Rows:
        return dequantized(name, specs[name], model.tensors, grids)

    def as_stored(name: str) -> Float32 | Rows:
        values = model.tensors[name].read()
        if values.ndim == 1:
            return values.astype(np.float32)
        matrices = values if values.ndim == 3 else values[None]
        return Rows(shape=values.shape, read=lambda x, rows: matrices[x, rows].astype(np.float32))

    exact = scheme.keep or scheme.matrices == "f32"
    vocab_size = int(model.config.vocab_size)
    reference = make_reference(model, as_compiled, None if exact else as_stored, vocab_size)
    (folder / artifact.REFERENCE_FILE).write_text(reference.to_json(), encoding="utf-8")


def _write_tokenizer(folder: Path, model: ModelSource) -> None:
    if model.tokenizer_json is not None:
        (folder / artifact.TOKENIZER_FILE).write_bytes(compact(model.tokenizer_json))
    if model.chat_template is not None:
        template = folder / artifact.CHAT_TEMPLATE_FILE
        template.write_text(model.chat_template, encoding="utf-8")
    if model.generation_config is not None:
        text = json.dumps(model.generation_config, indent=1)
        (folder / artifact.GENERATION_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _hashes(folder: Path) -> dict[str, str]:
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != artifact.MANIFEST_FILE
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(artifact.sha256_of, paths)
        return {str(p.relative_to(folder)): d for p, d in zip(paths, digests, strict=True)}


def _folder_name(title: str, quant: str, target: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{title}-{quant}-{target}").lower()

"""How GGUF tensors become model parameters, and which of them can keep their blocks.

Converters to GGUF reorder some tensors; transformers undoes that on dense arrays. What happens to
the rows of a matrix is found by running the same code on row numbers instead of weights: where only
rows moved, the exact blocks are moved likewise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers.integrations.gguf import GGUF_ARCHS, get_gguf_conversion_mapping
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from llmc.errors import ImportModelError, UnsupportedError
from llmc.formats import QuantizedMatrix, concatenate
from llmc.models.conversions import Recipe, recipes
from llmc.models.gguf_blocks import take_apart, to_dense
from llmc.models.gguf_config import ROPE_TENSORS
from llmc.models.gguf_file import GgufFile
from llmc.models.parameters import EmptyModel, ExpectedTensor
from llmc.models.source import Array, SourceTensor
from llmc.models.torch_numpy import to_numpy, to_torch

Load: TypeAlias = Callable[[str], Array]
_EXPERTS_PROBED = 2  # stacked experts are all treated alike: two show how


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """Makes one parameter from the file's tensors `keys`, given a function that loads them."""

    keys: tuple[str, ...]
    run: Callable[[Load], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufWeights:
    """The parameters of a model in a GGUF file."""

    file: GgufFile
    assemblies: dict[str, Assembly]  # by parameter name, aliases included
    orders: dict[object, Array | None] = field(default_factory=dict)  # row orders already found

    def source_tensors(self, model: EmptyModel) -> dict[str, SourceTensor]:
        """One source for each parameter, in the model's order; ImportModelError names a gap."""
        found: dict[str, SourceTensor] = {}
        for tensor in model.tensors.values():
            alias = next((alias for alias in tensor.aliases if alias in self.assemblies), None)
            if alias is not None:
                found[tensor.name] = self._source_tensor(tensor, self.assemblies[alias])
            elif tensor.required:
                raise ImportModelError(
                    f"{self.file.path}: no tensor for parameter {tensor.name!r}"
                    f" {list(tensor.shape)} of architecture {self.file.architecture!r}",
                    hint="the file is incomplete, or its layout is not known to transformers:"
                    " use the model's Hugging Face folder",
                )
        return found

    def _source_tensor(self, tensor: ExpectedTensor, assembly: Assembly) -> SourceTensor:
        sources = [self.file.tensors[key] for key in assembly.keys]
        stored = sum(math.prod(source.shape) for source in sources)
        if stored != math.prod(tensor.shape):
            raise ImportModelError(
                f"{self.file.path}: {assembly.keys[0]!r} has {stored} values,"
                f" {tensor.name!r} {list(tensor.shape)} takes {math.prod(tensor.shape)}",
                hint="the file's metadata do not fit its tensors: convert the model again",
            )
        return SourceTensor(
            name=tensor.name,
            shape=tensor.shape,
            stored="+".join(dict.fromkeys(source.stored for source in sources)),
            load=partial(self._dense, assembly),
            load_quantized=partial(self._quantized, assembly, tensor.shape),
        )

    def _dense(self, assembly: Assembly) -> Array:
        if len(assembly.keys) == 1:
            (key,) = assembly.keys
            probe = np.broadcast_to(np.float32(1), self.file.tensors[key].shape)
            if assembly.run(lambda _: probe) is probe:  # goes through untouched
                return self._values(key)
        values = {key: self._values(key) for key in assembly.keys}
        # Arithmetic on half precision would round: done in float32, and kept so where it must be.
        made = assembly.run(lambda key: values[key].astype(np.float32, copy=False))
        types = {value.dtype for value in values.values()}
        if len(types) == 1:
            narrow = made.astype(types.pop(), copy=False)
            if np.array_equal(narrow.astype(np.float32, copy=False), made):
                return narrow
        return made

    def _values(self, key: str) -> Array:
        tensor = self.file.tensors[key]
        blocks = self.file.blocks(key)
        return to_dense(tensor.type, blocks.reshape(-1, blocks.shape[-1])).reshape(tensor.shape)

    def _quantized(self, assembly: Assembly, shape: tuple[int, ...]) -> QuantizedMatrix | None:
        sources = [self.file.tensors[key] for key in assembly.keys]
        if len(shape) < 2 or len({source.type for source in sources}) != 1:
            return None
        parts = []
        for source in sources:
            blocks = self.file.blocks(source.name)
            part = take_apart(source.type, blocks.reshape(-1, blocks.shape[-1]))
            if part is None:
                return None
            parts.append(part)
        shapes = {source.name: source.shape for source in sources}
        pattern = tuple((re.sub(r"\d+", "#", key), shapes[key]) for key in assembly.keys)
        if (pattern, shape) not in self.orders:  # the same in every layer
            self.orders[pattern, shape] = row_order(assembly, shapes, shape)
        order = self.orders[pattern, shape]
        if order is None:
            return None
        matrix = concatenate(parts)
        if np.array_equal(order, np.arange(len(order))):
            return matrix
        return matrix.take_rows(order)


def gguf_weights(file: GgufFile, fields: dict[str, Any], model: EmptyModel) -> GgufWeights:
    """Finds for every parameter the tensors that feed it.

    `fields` are the config's, as the layouts depend on head counts. Raises UnsupportedError for a
    tensor of the file that has no place in the model: leaving it out would change the results.
    """
    if file.architecture in GGUF_ARCHS:
        return GgufWeights(file=file, assemblies=_converted(file, model))
    assemblies = _processed(file, fields, model)
    used = {key for assembly in assemblies.values() for key in assembly.keys} | ROPE_TENSORS
    for key in file.tensors:
        if key not in used:
            raise UnsupportedError(
                f"{file.path}: tensor {key!r} has no place in transformers' model of type"
                f" {model.model.config.model_type!r}",
                hint="use the model's Hugging Face folder",
            )
    return GgufWeights(file=file, assemblies=assemblies)


def row_order(
    assembly: Assembly, shapes: dict[str, tuple[int, ...]], shape: tuple[int, ...]
) -> Array | None:
    """Which row of the stacked sources each row of the parameter is; None if more than rows move.

    Rows of all sources are counted through, in the order of `assembly.keys`; a source or parameter
    `[X, M, K]` has X·M rows. Returns int64 `[rows of the parameter]`.
    """
    k = shape[-1]
    if any(source[-1] != k or len(source) != len(shape) for source in shapes.values()):
        return None
    experts = shape[0] if len(shape) == 3 else 1
    if len(shape) > 3 or (experts > 1 and {s[0] for s in shapes.values()} != {experts}):
        return None
    probed = min(experts, _EXPERTS_PROBED)
    cut = {key: _cut(source, probed) for key, source in shapes.items()}
    starts = np.cumsum([0, *(math.prod(source[:-1]) for source in cut.values())])
    probes = {
        key: np.broadcast_to(
            np.arange(start, start + math.prod(source[:-1]), dtype=np.int32).reshape(
                *source[:-1], 1
            ),
            source,
        )
        for (key, source), start in zip(cut.items(), starts, strict=False)
    }
    rows = assembly.run(probes.__getitem__)
    if rows is probes[assembly.keys[0]]:  # untouched
        return np.arange(math.prod(shape[:-1]))
    if rows.shape != _cut(shape, probed) or not np.array_equal(
        rows, np.broadcast_to(rows[..., :1], rows.shape)
    ):
        return None
    rows = rows[..., 0].reshape(-1).astype(np.int64)
    if not np.array_equal(np.sort(rows), np.arange(len(rows))):
        return None
    columns = np.arange(k, dtype=np.int32)
    made = assembly.run(lambda key: np.broadcast_to(columns, cut[key]))
    if not np.array_equal(made, np.broadcast_to(columns, made.shape)):
        return None
    if experts == 1:
        return rows
    return _for_all_experts(rows.reshape(probed, -1), list(cut.values()), probed, experts)


def _for_all_experts(
    rows: Array, cut: list[tuple[int, ...]], probed: int, experts: int
) -> Array | None:
    """Continues the order of the probed experts' rows `[probed, M]` to all of them."""
    per_expert = [source[1] for source in cut]
    order = np.empty((experts, rows.shape[1]), dtype=np.int64)
    start = full_start = 0
    for size in per_expert:
        inside = (rows >= start) & (rows < start + probed * size)
        expert, row = np.divmod(rows - start, size)
        own = np.where(inside, expert == np.arange(probed)[:, None], True)
        alike = np.array_equal(inside[0], inside[-1]) and np.array_equal(
            row[0][inside[0]], row[-1][inside[-1]]
        )
        if not (own.all() and alike):
            return None
        begins = full_start + np.arange(experts)[:, None] * size
        order[:, inside[0]] = begins + row[0][inside[0]]
        start += probed * size
        full_start += experts * size
    return order.reshape(-1)


def _cut(shape: tuple[int, ...], probed: int) -> tuple[int, ...]:
    return (probed, *shape[1:]) if len(shape) == 3 else shape


def _converted(file: GgufFile, model: EmptyModel) -> dict[str, Assembly]:
    """Assemblies of the architectures that transformers describes by weight transforms."""
    transforms = get_gguf_conversion_mapping(file.architecture, model.model.config)
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    made: dict[str, Assembly] = {}
    for recipe in recipes(file.tensors, transforms, model.model):
        for name in recipe.outline(shapes):
            made[name] = Assembly(keys=tuple(recipe.keys), run=partial(_run_recipe, recipe, name))
    return made


def _run_recipe(recipe: Recipe, name: str, load: Load) -> Array:
    if recipe.converter is None:
        return load(recipe.keys[0])
    return to_numpy(recipe.run(lambda key: to_torch(load(key)))[name])


def _processed(file: GgufFile, fields: dict[str, Any], model: EmptyModel) -> dict[str, Assembly]:
    """Assemblies of the architectures that transformers describes by tensor processors."""
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=fields)
    names = _parameter_names(file, model, processor)
    keys: dict[str, list[str]] = {}
    for key in file.tensors:
        name = names.get(key) or names.get(key.removesuffix(".weight"))
        if name is not None:
            keys.setdefault(name, []).append(key)
    return {
        name: Assembly(
            keys=tuple(group), run=partial(_run_processor, processor, names, name, tuple(group))
        )
        for name, group in keys.items()
    }


def _run_processor(
    processor: TensorProcessor, names: dict[str, str], name: str, keys: tuple[str, ...], load: Load
) -> Array:
    collected: dict[str, Any] = {"tensors": {}}  # where processors put what they merge
    made: Array | None = None
    for key in keys:
        result = processor.process(
            weights=load(key), name=key, tensor_key_mapping=names, parsed_parameters=collected
        )
        if result.name is not None:
            made = result.weights
    if name in collected["tensors"]:
        return to_numpy(collected["tensors"][name])
    if made is None:
        raise UnsupportedError(f"tensor {keys[0]!r} cannot be brought into the model's layout")
    return made


def _parameter_names(
    file: GgufFile, model: EmptyModel, processor: TensorProcessor
) -> dict[str, str]:
    """GGUF tensor name -> parameter name.

    As `get_gguf_hf_weights_map` of transformers, which builds its table anew for every module.
    """
    arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}.get(file.architecture)
    if arch is None:
        raise UnsupportedError(
            f"{file.path}: GGUF architecture {file.architecture!r} is not known to `gguf`",
            hint="upgrade: pip install -U gguf",
        )
    table = get_tensor_name_map(arch, model.model.config.num_hidden_layers)
    found: dict[str, str] = {}
    left = [(name, "") for name in model.model.state_dict()]
    while left:  # some files name tensors as a submodule does: look there after the whole model
        deeper: list[tuple[str, str]] = []
        level: dict[str, str] = {}
        for name, prefix in left:
            plain = processor.preprocess_name(name)
            stem, dot, suffix = plain.rpartition(".")
            if suffix not in ("weight", "bias"):
                stem, dot, suffix = plain, "", ""
            gguf_name = table.get_name(stem)
            if gguf_name is None:
                processor.perform_fallback_tensor_mapping(level, dot + suffix, prefix, plain)
            else:
                level[gguf_name + dot + suffix] = prefix + name
            head, dot, tail = name.partition(".")
            if dot:
                deeper.append((tail, f"{prefix}{head}."))
        found = level | found
        left = deeper
    return found

"""A model in Hugging Face's folder layout: config.json, *.safetensors, tokenizer files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping

from llmc.errors import ImportModelError, UnsupportedError
from llmc.models.conversions import Recipe, recipes
from llmc.models.folder_tokenizer import chat_template_of, end_token_id_of, tokenizer_json_of
from llmc.models.json_file import read_json
from llmc.models.parameters import EmptyModel, ExpectedTensor, config_from_dict, empty_model
from llmc.models.safetensors_file import StoredTensor, open_safetensors
from llmc.models.source import Array, ModelSource, SourceTensor
from llmc.models.torch_numpy import to_numpy, to_torch

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_STORED = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_DOWNLOAD = "download the model again"


def open_folder(path: Path, name: str, *, weights: bool = True) -> ModelSource:
    """Opens the folder at `path`; only headers and small files are read, without `weights` no
    headers either.

    Raises ImportModelError and UnsupportedError as `open_source` does.
    """
    fields = _config_fields(path)
    config = config_from_dict(fields, str(path / _CONFIG))
    model = empty_model(config)
    generation = read_json(path / "generation_config.json")
    tokenizer = tokenizer_json_of(path)
    # What the files state goes before what the config class assumes.
    stated = [generation or {}, fields, fields.get("text_config")]
    assumed = [vars(config), vars(config.get_text_config())]
    stops = [*_token_ids(stated, "eos_token_id"), *end_token_id_of(path, tokenizer)]
    begins = [*_token_ids(stated, "bos_token_id"), *_token_ids(assumed, "bos_token_id")]
    return ModelSource(
        name=name,
        config=config,
        tensors=_source_tensors(path, _stored_tensors(path), model) if weights else _shapes(model),
        tokenizer_json=tokenizer,
        chat_template=chat_template_of(path),
        bos_token_id=begins[0] if begins else None,
        stop_token_ids=list(dict.fromkeys(stops or _token_ids(assumed, "eos_token_id"))),
        generation_config=generation,
    )


def _config_fields(path: Path) -> dict[str, Any]:
    fields = read_json(path / _CONFIG)
    if fields is None:
        files = sorted(path.glob("*.gguf"))
        raise ImportModelError(
            f"{path}: no {_CONFIG} in this folder",
            hint=f"give the file itself: {files[0]}" if files else "give a model's folder",
        )
    quantization = fields.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedError(
            f"{path}: the weights are quantized with {method or str(quantization)[:60]!r}",
            hint="use the unquantized model, or a GGUF file of it",
        )
    return fields


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder by the checkpoint's names."""
    index = read_json(path / _INDEX)
    if index is not None:
        return _sharded_tensors(path, index)
    files = [path / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(
            file for file in path.glob("*.safetensors") if not file.name.startswith("consolidated")
        )
    if files:
        return {key: tensor for file in files for key, tensor in open_safetensors(file).items()}
    pickles = sorted(file for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise ImportModelError(
            f"{path}: weights only as pickle ({pickles[0].name}), which can run any code when read",
            hint="convert them to safetensors, e.g. with the hub's convert-to-safetensors space",
        )
    raise ImportModelError(f"{path}: no *.safetensors in this folder", hint=_DOWNLOAD)


def _sharded_tensors(path: Path, index: dict[str, Any]) -> dict[str, StoredTensor]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ImportModelError(
            f"{path / _INDEX}: weight_map is {str(places)[:60]!r}, expected names to files",
            hint=_DOWNLOAD,
        )
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ImportModelError(f"{path / _INDEX}: file name {name!r} leaves the folder")
        if not (path / name).is_file():
            raise ImportModelError(
                f"{path}: shard {name!r} is missing, {_INDEX} names it", hint=_DOWNLOAD
            )
        shards[name] = open_safetensors(path / name)
    for key, name in places.items():
        if key not in shards[name]:
            raise ImportModelError(
                f"{path / name}: tensor {key!r} is missing, {_INDEX} places it there",
                hint=_DOWNLOAD,
            )
    return {key: shards[name][key] for key, name in places.items()}


def _source_tensors(
    path: Path, files: dict[str, StoredTensor], model: EmptyModel
) -> dict[str, SourceTensor]:
    """One source for each parameter of the model, in the model's order."""
    shapes = {key: tensor.shape for key, tensor in files.items()}
    makers: dict[str, Recipe] = {}
    for recipe in recipes(files, get_model_conversion_mapping(model.model), model.model):
        makers.update(dict.fromkeys(recipe.outline(shapes), recipe))
    found: dict[str, SourceTensor] = {}
    for tensor in model.tensors.values():
        alias = next((alias for alias in tensor.aliases if alias in makers), None)
        if alias is not None:
            found[tensor.name] = _source_tensor(tensor, alias, makers[alias], files)
        elif tensor.required:
            raise ImportModelError(
                f"{path}: no tensor for parameter {tensor.name!r} {list(tensor.shape)}",
                hint=f"the checkpoint has {len(files)} tensors and is incomplete: {_DOWNLOAD}",
            )
    return found


def _shapes(model: EmptyModel) -> dict[str, SourceTensor]:
    """The parameters that a checkpoint would have to hold; reading one is an ImportModelError."""

    def load() -> Array:
        raise ImportModelError("the model was opened without its weights")

    return {
        tensor.name: SourceTensor(name=tensor.name, shape=tensor.shape, stored="f32", load=load)
        for tensor in model.tensors.values()
        if tensor.required
    }


def _source_tensor(
    tensor: ExpectedTensor, alias: str, recipe: Recipe, files: dict[str, StoredTensor]
) -> SourceTensor:
    stored = list(dict.fromkeys(files[key].dtype for key in recipe.keys))
    load: Callable[[], Array]
    if recipe.converter is None:
        source = files[recipe.keys[0]]
        load = source.read
        shape = source.shape
    else:
        load = partial(_convert, recipe, alias, files)
        shape = recipe.outline({key: files[key].shape for key in recipe.keys})[alias]
    if shape != tensor.shape:
        raise ImportModelError(
            f"tensor {alias!r} has shape {list(shape)}, the config asks for {list(tensor.shape)}",
            hint=f"config and weights do not belong together: {_DOWNLOAD}",
        )
    return SourceTensor(
        name=tensor.name,
        shape=tensor.shape,
        stored="+".join(_STORED.get(dtype, dtype.lower()) for dtype in stored),
        load=load,
    )


def _convert(recipe: Recipe, name: str, files: dict[str, StoredTensor]) -> Array:
    return to_numpy(recipe.run(lambda key: to_torch(files[key].read()))[name])


def _token_ids(parts: Iterable[object], key: str) -> list[int]:
    """The token ids under `key` in any of `parts`: each holds one, a list of them or none."""
    found: list[int] = []
    for part in parts:
        value = part.get(key) if isinstance(part, dict) else None
        for item in value if isinstance(value, list) else [value]:
            if type(item) is int and item >= 0:
                found.append(item)
    return found

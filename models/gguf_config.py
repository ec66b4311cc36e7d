"""The config of a GGUF file: its metadata under the names that transformers gives the fields.

transformers holds the tables. For newer architectures it maps metadata directly; the older reader
wants a file and takes many seconds over the vocabulary, so it is given an outline of the file:
the same metadata without the tokenizer, the same tensor names without data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from transformers import PreTrainedConfig
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmc.errors import ImportModelError, UnsupportedError
from llmc.models.gguf_blocks import to_dense
from llmc.models.gguf_file import GgufFile
from llmc.models.names import rope_factor_schemes
from llmc.models.parameters import config_from_dict

_EMBEDDING = "token_embd.weight"
_POSITIONS = "position_embd.weight"
_FACTORS = "rope_freqs.weight"
_LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
ROPE_TENSORS = frozenset({_FACTORS, *_LONG_FACTORS})  # they feed the config, not a parameter
_FULL = "full_attention"
_TOKEN_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
# Fields that transformers' tables leave at one checkpoint's defaults, though the file states them.
_ALSO = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_YARN = {  # metadata key -> name in rope parameters
    "attn_factor": "attention_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def gguf_config(file: GgufFile) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config object of `file`, and the fields it was made from.

    Raises UnsupportedError for an architecture or rotary scaling that cannot be expressed,
    ImportModelError where metadata is missing.
    """
    fields = _fields(file)
    return config_from_dict(fields, str(file.path)), fields


def token_id(file: GgufFile, key: str) -> int | None:
    """`tokenizer.ggml.<key>`; None where it is absent or, as converters write, outside."""
    value = file.optional_int(f"tokenizer.ggml.{key}")
    return value if value is not None and value < file.tensors[_EMBEDDING].shape[0] else None


def _fields(file: GgufFile) -> dict[str, Any]:
    if _EMBEDDING not in file.tensors:
        raise ImportModelError(
            f"{file.path}: no tensor {_EMBEDDING!r}",
            hint="this file holds no language model (an adapter, or one shard of several?)",
        )
    try:
        if file.architecture in GGUF_CONFIG_ARCHS:
            fields = _mapped_fields(file)
        else:
            fields = _outlined_fields(file)
            _add_stated_fields(file, fields)
            _add_rope_scaling(file, fields)
    except KeyError as exc:
        raise ImportModelError(
            f"{file.path}: metadata key {exc.args[0]!r} is missing",
            hint="convert the model to GGUF with a recent converter",
        ) from exc
    # The embedding's rows count the vocabulary; metadata may count it before padding.
    fields["vocab_size"] = file.tensors[_EMBEDDING].shape[0]
    if _POSITIONS in file.tensors:
        fields["max_position_embeddings"] = file.tensors[_POSITIONS].shape[0]
    for name, key in _TOKEN_IDS.items():
        fields.setdefault(name, token_id(file, key))
    fields.pop("_model_name_or_path", None)
    return fields


def _mapped_fields(file: GgufFile) -> dict[str, Any]:
    metadata = {
        key: len(value)
        if isinstance(value, list) and value and isinstance(value[0], str)
        else value
        for key, value in file.metadata.items()
    }
    fields: dict[str, Any] = get_gguf_config(metadata, tuple(file.tensors))
    return fields


def _outlined_fields(file: GgufFile) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        outline = Path(folder) / "outline.gguf"
        _write_outline(file, outline)
        try:
            fields: dict[str, Any] = load_gguf_checkpoint(str(outline))["config"]
        except ValueError as exc:
            if "not supported yet" not in str(exc):
                raise
            raise UnsupportedError(
                f"{file.path}: GGUF architecture {file.architecture!r} unknown to transformers",
                hint="use the model's Hugging Face folder, or upgrade: pip install -U transformers",
            ) from exc
    return fields


def _write_outline(file: GgufFile, path: Path) -> None:
    writer = GGUFWriter(path, file.architecture)
    for key, value in file.metadata.items():
        if key in ("general.architecture", "general.alignment") or key.startswith("tokenizer."):
            continue
        if isinstance(value, list):
            if value and not isinstance(value[0], str):
                writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_int64 if value < 1 << 63 else writer.add_uint64)(key, value)
        elif isinstance(value, float):
            writer.add_float64(key, value)
        else:
            writer.add_string(key, value)
    writer.add_token_list(["-"])  # the reader wants to count some
    for name in file.tensors:
        writer.add_tensor_info(name, (0,), np.dtype(np.float32), 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_stated_fields(file: GgufFile, fields: dict[str, Any]) -> None:
    defaults = _defaults(fields)
    for key, name in _ALSO.items():
        value = file.optional_int(f"{file.architecture}.{key}")
        stated = any(field.endswith(name) for field in fields)
        if value is not None and not stated and hasattr(defaults, name):
            fields[name] = value
    _add_rotary_fields(file, fields, getattr(defaults, "rope_parameters", None) or {})


def _add_rotary_fields(file: GgufFile, fields: dict[str, Any], default: dict[str, Any]) -> None:
    base = file.metadata.get(f"{file.architecture}.rope.freq_base")
    if isinstance(base, float) and "rope_theta" in default:
        fields.setdefault("rope_theta", base)
    rotary = file.optional_int(f"{file.architecture}.rope.dimension_count")
    heads = fields.get("num_attention_heads")
    if rotary and heads and default and "hidden_size" in fields:
        head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
        if rotary != head_dim:
            fields["partial_rotary_factor"] = rotary / head_dim


def _add_rope_scaling(file: GgufFile, fields: dict[str, Any]) -> None:
    prefix = f"{file.architecture}.rope.scaling."
    given = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    kind = given.get("type")
    scaling: dict[str, Any] = {}
    if _LONG_FACTORS[0] in file.tensors:
        scaling = _long_factors(file, fields, given)
    elif _FACTORS in file.tensors:
        scaling = _scheme_of_factors(file, fields)
    elif kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": given["factor"]}
        if kind == "yarn":
            scaling |= {name: given[key] for key, name in _YARN.items() if key in given}
            scaling["original_max_position_embeddings"] = given["original_context_length"]
    elif kind not in (None, "none"):
        raise UnsupportedError(f"{file.path}: unknown rotary scaling {kind!r}")
    if not scaling:
        return
    fields.pop("rope_scaling", None)
    default = getattr(_defaults(fields), "rope_parameters", None) or {}
    if _FULL in default:  # per kind of layer: GGUF states the scaling of full attention
        plain = {**default[_FULL], "rope_theta": fields.get("rope_theta")}
        fields["rope_parameters"] = {**default, _FULL: plain | scaling}
        return
    if default.get("rope_type") == scaling["rope_type"]:  # what GGUF does not state
        scaling = default | scaling
    scaling["rope_theta"] = fields.pop("rope_theta", default.get("rope_theta"))
    fields["rope_parameters"] = scaling


def _factors(file: GgufFile, name: str) -> list[float]:
    tensor = file.tensors[name]
    values = to_dense(tensor.type, file.blocks(name).reshape(1, -1))
    return [float(value) for value in values.reshape(-1)]


def _long_factors(
    file: GgufFile, fields: dict[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    original = given.get("original_context_length", fields.get("max_position_embeddings"))
    scaling = {
        "rope_type": "longrope",
        "long_factor": _factors(file, _LONG_FACTORS[0]),
        "short_factor": _factors(file, _LONG_FACTORS[1]),
        "original_max_position_embeddings": original,
    }
    if "attn_factor" in given:
        scaling["attention_factor"] = given["attn_factor"]
    fields["original_max_position_embeddings"] = original
    return scaling


def _scheme_of_factors(file: GgufFile, fields: dict[str, Any]) -> dict[str, Any]:
    """The rotary scaling whose frequencies are the plain ones divided by the file's factors."""
    factors = np.array(_factors(file, _FACTORS), dtype=np.float64)
    if np.all(factors == 1.0):
        return {}
    dim = 2 * len(factors)
    theta = float(fields.get("rope_theta", 10_000.0))
    expected = theta ** (-np.arange(0, dim, 2) / dim) / factors
    for scheme in rope_factor_schemes():
        scaling = {**scheme, "factor": float(factors.max()), "rope_theta": theta}
        config = PreTrainedConfig(
            head_dim=dim,
            max_position_embeddings=fields.get("max_position_embeddings"),
            rope_parameters=scaling,
        )
        found, _ = ROPE_INIT_FUNCTIONS[scheme["rope_type"]](config, "cpu")
        # Both were computed in float32 from the same formula.
        if np.allclose(found.numpy(), expected, rtol=1e-4, atol=0.0):
            return scaling
    raise UnsupportedError(
        f"{file.path}: the rotary factors in {_FACTORS!r} follow no known scaling"
        f" (largest factor {factors.max():g}, {len(factors)} of them)",
        hint="use the model's Hugging Face folder, whose config states the scaling",
    )


def _defaults(fields: Mapping[str, Any]) -> PreTrainedConfig | None:
    """What the config class assumes where nothing is stated; None for an unknown model type."""
    model_type = fields.get("model_type")
    return CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else None

"""Small GGUF files for tests: models with random weights, vocabularies of a few tokens."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.models.torch_numpy import to_numpy

Quantize = Callable[[str, np.ndarray], gguf.GGMLQuantizationType]


def random_model(model_type: str, fields: Mapping[str, object]):
    """A model with random parameters, norms and biases included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def plain(_: str, values: np.ndarray) -> gguf.GGMLQuantizationType:
    """Everything in float32."""
    return gguf.GGMLQuantizationType.F32


def matrices_as(type_: gguf.GGMLQuantizationType) -> Quantize:
    """Matrices as blocks, vectors in float32: what converters do."""
    return lambda name, values: type_ if values.ndim > 1 else plain(name, values)


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, object],
    tensors: Mapping[str, np.ndarray],
    quantized: Quantize = plain,
) -> Path:
    """Writes a file; metadata keys without a dot at their head belong to the architecture.

    Tensors of bytes are blocks already, of the type that `quantized` says.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
            continue
        key = (
            key if key.startswith(("tokenizer.", "general.", "split.")) else f"{architecture}.{key}"
        )
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))
    for name, values in tensors.items():
        type_ = quantized(name, values)
        blocks = values if values.dtype == np.uint8 else quantize(values, type_)
        writer.add_tensor(name, blocks, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Byte offsets of the float16 fields of a block: random bytes there would be NaN or infinity.
HALVES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82),
    "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,),
}  # fmt: skip


def random_blocks(
    name: str, rows: int, per_row: int, *, seed: int = 7, scale: float = 0.02
) -> tuple[gguf.GGMLQuantizationType, np.ndarray]:
    """(type, blocks `[rows, bytes]`) with any codes and sub-scales, and normal float16 scales."""
    type_ = gguf.GGMLQuantizationType[name.upper()]
    num_bytes = gguf.GGML_QUANT_SIZES[type_][1]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * per_row, num_bytes), dtype=np.uint8)
    for at in HALVES[name]:
        half = rng.normal(0, scale, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = half.view(np.uint8)
    return type_, blocks.reshape(rows, per_row * num_bytes)


def parameters(model) -> dict[str, np.ndarray]:
    """The model's parameters in float32, ties once."""
    return {name: to_numpy(value) for name, value in model.named_parameters()}


def renamed(
    values: Mapping[str, np.ndarray], names: Mapping[str, str], num_layers: int
) -> dict[str, np.ndarray]:
    """Parameters under GGUF's names; `names` maps parameter to GGUF, `#` stands for the layer."""
    found = {}
    for name, gguf_name in names.items():
        for layer in range(num_layers) if "#" in name else [0]:
            found[gguf_name.replace("#", str(layer))] = values[name.replace("#", str(layer))]
    return found


def byte_level_vocabulary(extra: list[str] = ()) -> list[str]:
    """The 256 printable stand-ins of the bytes, then `extra`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    return (
        [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(other))] + list(extra)
    )

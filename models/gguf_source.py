"""A model in one GGUF file: config, weights and tokenizer from the same header."""

from __future__ import annotations

import re
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from llmc.errors import UnsupportedError
from llmc.models.gguf_config import gguf_config, token_id
from llmc.models.gguf_file import GgufFile
from llmc.models.gguf_tokenizer import build_tokenizer
from llmc.models.gguf_weights import gguf_weights
from llmc.models.parameters import empty_model
from llmc.models.source import ModelSource, artifact_name

_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of text, turn and message
_TYPES = "|".join(sorted((type_.name.lower() for type_ in GGMLQuantizationType), reverse=True))
_TYPE_SUFFIX = re.compile(rf"[-_.](?:ud-)?(?:i1-)?(?:{_TYPES})(?:_(?:xs|s|m|l|xl))?$")


def open_gguf(path: Path) -> ModelSource:
    """Opens a GGUF file; only its header is read.

    Raises ImportModelError and UnsupportedError as `open_source` does.
    """
    file = GgufFile.open(path)
    shards = file.optional_int("split.count")
    if shards is not None and shards > 1:
        raise UnsupportedError(
            f"{path}: one of {shards} parts of a split GGUF file",
            hint="join them first with the GGUF split tool's --merge",
        )
    config, fields = gguf_config(file)
    model = empty_model(config)
    return ModelSource(
        name=artifact_name(_TYPE_SUFFIX.sub("", path.stem.lower())),
        config=config,
        tensors=gguf_weights(file, fields, model).source_tensors(model),
        tokenizer_json=build_tokenizer(file),
        chat_template=file.optional_string("tokenizer.chat_template"),
        bos_token_id=token_id(file, "bos_token_id"),
        stop_token_ids=list(
            dict.fromkeys(found for key in _STOP_KEYS if (found := token_id(file, key)) is not None)
        ),
        generation_config=None,
    )

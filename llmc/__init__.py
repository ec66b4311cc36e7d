"""llmc: compile any language model once, serve it anywhere.

The names below load on first use, so that `import llmc` is quick and a server never imports the
compile side.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.compile import compile_model as compile
    from llmc.runtime.engine import Engine
    from llmc.runtime.outputs import RequestOutput
    from llmc.runtime.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = ["Engine", "LlmcError", "RequestOutput", "SamplingParams", "__version__", "compile"]

_LAZY = {
    "Engine": ("llmc.runtime.engine", "Engine"),
    "RequestOutput": ("llmc.runtime.outputs", "RequestOutput"),
    "SamplingParams": ("llmc.runtime.sampling_params", "SamplingParams"),
    "compile": ("llmc.compiler.compile", "compile_model"),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and a function
    if name not in _LAZY:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

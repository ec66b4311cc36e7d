"""The parameters a model expects, from its config alone: built without memory for weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmc.errors import ImportModelError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTensor:
    """A parameter or persistent buffer; `aliases` are all names it is known by, its own first."""

    name: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...]
    required: bool  # parameters are; buffers have a value from the config


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyModel:
    """A model whose parameters have shapes and no memory."""

    model: Any  # transformers' PreTrainedModel
    tensors: dict[str, ExpectedTensor]  # named_parameters() in order, then persistent buffers


def config_from_dict(fields: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """The config object of `fields["model_type"]`; remote code is never run.

    Raises UnsupportedError for a model type this transformers does not know, ImportModelError where
    the fields do not make a config.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise ImportModelError(
            f"{where}: model_type is {model_type!r}, expected a string",
            hint="this is not the config of a transformers model",
        )
    if model_type not in CONFIG_MAPPING:
        remote = fields.get("auto_map")
        if remote:
            raise UnsupportedError(
                f"{where}: model type {model_type!r} needs Python code from the model's folder"
                " (auto_map), which is never run",
                hint="use a version of the model that transformers implements itself",
            )
        raise UnsupportedError(
            f"{where}: unknown model type {model_type!r}",
            hint="upgrade: pip install -U transformers",
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(fields))
    except Exception as exc:  # validators of the config classes raise errors of many kinds
        raise ImportModelError(
            f"{where}: not a valid config of model type {model_type!r}: {_first_line(exc)}",
            hint="the config is damaged or newer than this transformers",
        ) from exc


def empty_model(config: PreTrainedConfig, **implementations: str) -> EmptyModel:
    """Builds the causal language model of `config` in float32 without memory for its weights.

    Parameters are on the meta device, buffers hold their values (rotary frequencies are computed
    when a model is built). `implementations` go to transformers (`attn_implementation=…`). Raises
    UnsupportedError where transformers has no such model, ImportModelError where the config
    contradicts itself.
    """
    try:
        with _LargeOnMeta(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **implementations)
    except ValueError as exc:
        if "Unrecognized configuration class" not in str(exc):
            raise _unbuildable(config, exc) from exc
        raise UnsupportedError(
            f"model type {config.model_type!r} has no causal language model in transformers",
            hint="only models that generate text token by token can be compiled",
        ) from exc
    except (TypeError, RuntimeError, AttributeError, KeyError, ZeroDivisionError) as exc:
        if isinstance(exc, KeyError) and exc.args[0] in implementations.values():
            raise UnsupportedError(
                f"{config.model_type}: its attention is chosen from a list of its own, which does "
                f"not have {exc.args[0]!r}",
                hint="models with built-in attention or recurrent state are not supported yet",
            ) from exc
        raise _unbuildable(config, exc) from exc
    model.tie_weights()
    model.eval()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    expected = {
        name: ExpectedTensor(
            name=name,
            shape=tuple(parameter.shape),
            aliases=tuple(names[id(parameter)]),
            required=True,
        )
        for name, parameter in model.named_parameters()
    }
    known = {alias for tensor in expected.values() for alias in tensor.aliases}
    for name, buffer in model.state_dict().items():
        if name not in known:
            expected[name] = ExpectedTensor(
                name=name, shape=tuple(buffer.shape), aliases=(name,), required=False
            )
    return EmptyModel(model=model, tensors=expected)


class _LargeOnMeta(TorchFunctionMode):  # type: ignore[misc] # torch is untyped
    """Sends large new tensors to the meta device: only parameters are large.

    init_empty_weights moves parameters there once they exist, too late for a stack of experts.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get("device") is None:
            size = args[0] if args and isinstance(args[0], tuple | list) else args
            if all(isinstance(n, int) for n in size) and math.prod(size) >= _LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand)
_LARGE = 1 << 20  # elements


def _unbuildable(config: PreTrainedConfig, exc: Exception) -> ImportModelError:
    return ImportModelError(
        f"no model of type {config.model_type!r} can be built from the config: {_first_line(exc)}",
        hint="the config is damaged or newer than this transformers",
    )


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:200]

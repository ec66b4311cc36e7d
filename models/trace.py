"""Traces any decoder of transformers into one Relax function, without its weights.

    main(input_ids [1, T] i32, positions [1, T] i32, logits_rows [L] i32, *params)
        -> logits [1, L, V]

All sequences' tokens lie packed along one axis, there is no cache, and each attention is one opaque
operator.
Nothing is allocated for the parameters: a model of any size is traced in the memory of its graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import tvm
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from transformers import PreTrainedConfig
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from llmc import dialect
from llmc.errors import UnsupportedError
from llmc.models import torch_ops
from llmc.models.parameters import empty_model

# Operators that stay whole because a Relax operator of the same meaning exists.
_KEPT_WHOLE = (
    torch.ops.aten.linear.default,
    torch.ops.aten.silu.default,
    torch.ops.aten.gelu.default,
    torch.ops.aten.addmm.default,
)
_EXAMPLE_TOKENS = 12
_EXAMPLE_ROWS = (3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A traced model.

    module holds `main`; parameters maps each of its weight arguments to the name of the model's
    parameter, in argument order, after the three inputs.
    """

    module: tvm.IRModule
    parameters: dict[str, str]
    num_parameters: int  # elements, shared ones once


def trace(config: PreTrainedConfig) -> Trace:
    """Traces the causal language model of `config` in float32.

    Raises UnsupportedError, naming operator or model type, where the model cannot be traced.
    """
    torch_ops.register()
    with _quiet():
        model = _fake_model(config)
        program = _export(model, config)
        importer = _Importer()
        try:
            module = importer.from_exported_program(program, True, True, False, _CONVERTERS)
        except (AssertionError, KeyError, TypeError, ValueError, NotImplementedError) as exc:
            raise UnsupportedError(
                f"{config.model_type}: an operator of the traced model has no Relax counterpart: "
                f"{_first_line(exc)}",
                hint="add a converter in models/trace.py",
            ) from exc
    specs = program.graph_signature.input_specs
    kind = torch.export.graph_signature.InputKind.PARAMETER
    canonical = _canonical_names(model)
    parameters = {
        s.arg.name: canonical[s.target.removeprefix("model.")] for s in specs if s.kind is kind
    }
    main = module["main"].without_attr("params")
    module = tvm.IRModule({"main": main})
    unused = {p.name for p in main.params[3:]} - set(parameters)
    if unused:
        raise UnsupportedError(f"{config.model_type}: inputs that are not parameters: {unused}")
    return Trace(
        module=module,
        parameters=parameters,
        num_parameters=sum(p.numel() for p in model.parameters()),
    )


def _fake_model(config: PreTrainedConfig) -> torch.nn.Module:
    """The model with fake CPU parameters, which torch.export wants instead of meta ones."""
    model: torch.nn.Module = empty_model(
        config,
        attn_implementation=torch_ops.IMPLEMENTATION,
        experts_implementation=torch_ops.IMPLEMENTATION,
    ).model
    replaced: dict[int, torch.nn.Parameter] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if id(parameter) not in replaced:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                replaced[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, replaced[id(parameter)])
    return model


def _canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Each parameter name -> the first name of the same (tied) tensor; export forgets ties."""
    first: dict[int, str] = {}
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names


class _Packed(torch.nn.Module):  # type: ignore[misc]
    """The model as a function of packed tokens and the rows whose logits are wanted."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, logits_rows: torch.Tensor
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=None,
            use_cache=False,
            logits_to_keep=logits_rows,
        ).logits
        return logits


def _export(model: torch.nn.Module, config: PreTrainedConfig) -> ExportedProgram:
    tokens, rows = Dim("T", min=2, max=1 << 20), Dim("L", min=2, max=1 << 20)
    example = (
        torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int32),
        torch.arange(_EXAMPLE_TOKENS, dtype=torch.int32)[None],
        torch.tensor(_EXAMPLE_ROWS, dtype=torch.int32),
    )
    dynamic = {"input_ids": {1: tokens}, "positions": {1: tokens}, "logits_rows": {0: rows}}
    decompositions = torch.export.default_decompositions()
    for operator in _KEPT_WHOLE:
        decompositions.pop(operator, None)
    try:
        with torch.no_grad():
            program = export(_Packed(model), example, dynamic_shapes=dynamic, strict=False)
            program = program.run_decompositions(decompositions)
    except UnsupportedError:
        raise
    except Exception as exc:  # torch.export raises many types, all meaning "not traceable"
        foreign = _foreign_layers(model)
        raise UnsupportedError(
            f"{config.model_type}: torch.export cannot trace {foreign or 'this model'}: "
            f"{_first_line(exc)}",
            hint=_FOREIGN_HINT
            if foreign
            else "the model branches on its data, or does not accept packed positions",
        ) from exc
    if not any(n.target is torch.ops.llmc.attention.default for n in program.graph.nodes):
        raise UnsupportedError(
            f"{config.model_type}: {_foreign_layers(model) or 'its attention'} does not use "
            "transformers' attention interface",
            hint=_FOREIGN_HINT,
        )
    return program


_FOREIGN_HINT = "models with built-in attention or recurrent state are not supported yet"


def _foreign_layers(model: torch.nn.Module) -> str:
    """Classes of layers that are no attention of transformers' interface, joined; often none.

    What keeps state for a layer knows the layer's number, and what uses the interface says whether
    it is causal.
    """

    def numbered(module: torch.nn.Module) -> bool:
        return any(isinstance(getattr(module, n, None), int) for n in ("layer_idx", "layer_id"))

    innermost = [
        m
        for m in model.modules()
        if numbered(m) and sum(numbered(inner) for inner in m.modules()) == 1
    ]
    return ", ".join(sorted({type(m).__name__ for m in innermost if not hasattr(m, "is_causal")}))


class _Importer(ExportedProgramImporter):  # type: ignore[misc]
    """TVM's importer, made not to copy parameters that have no data."""

    @staticmethod
    def _convert_pytorch_tensor_to_tvm(tensor: torch.Tensor) -> tvm.runtime.Tensor | None:
        if isinstance(tensor, FakeTensor):
            return None
        return ExportedProgramImporter._convert_pytorch_tensor_to_tvm(tensor)


Converter = Callable[[torch.fx.Node, Any], relax.Var]


def _attention(node: torch.fx.Node, importer: Any) -> relax.Var:  # noqa: ANN401 - TVM's importer
    query, key, value, sinks, layer, scale, window, softcap = importer.retrieve_args(node)
    op = dialect.Attention(layer=layer, scale=scale, window=window or None, softcap=softcap or None)
    return importer.block_builder.emit(op.call(query, key, value, sinks))


def _grouped_linear(node: torch.fx.Node, importer: Any) -> relax.Var:  # noqa: ANN401
    x, weight, bias, expert_ids, transposed = importer.retrieve_args(node)
    op = dialect.GroupedLinear(transposed=transposed)
    expert_ids = importer.block_builder.emit(relax.op.astype(expert_ids, "int32"))
    return importer.block_builder.emit(op.call(x, weight, bias, expert_ids))


def _linear(node: torch.fx.Node, importer: Any) -> relax.Var:  # noqa: ANN401
    x, weight, *bias = importer.retrieve_args(node)
    op = dialect.Linear(transposed=False)
    return importer.block_builder.emit(op.call(x, weight, bias[0] if bias else None))


def _addmm(node: torch.fx.Node, importer: Any) -> relax.Var:  # noqa: ANN401
    bias, x, weight = importer.retrieve_args(node)
    op = dialect.Linear(transposed=True)
    return importer.block_builder.emit(op.call(x, weight, bias))


_CONVERTERS: dict[str, Converter] = {
    "attention.default": _attention,
    "grouped_linear.default": _grouped_linear,
    "linear.default": _linear,
    "addmm.default": _addmm,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warnings of torch and transformers that no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {text[0][:300] if text else ''}"

"""Opaque torch operators that keep what matters of a model whole while it is traced.

`torch.export` sees each attention and each mixture-of-experts product as one node that carries its
attributes (scale, window, softcap, sinks) and whose key/value heads are not repeated. transformers
offers a registry for both; nothing here depends on a particular model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmc.errors import UnsupportedError

IMPLEMENTATION = "llmc"


@torch.library.custom_op("llmc::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Causal attention, query `[1, H, T, D]`, key and value `[1, Kv, T, D]` -> `[1, T, H, Dv]`.

    window and softcap are 0 where the layer has none; sinks is `[H]` or None.
    """
    raise RuntimeError("llmc::attention exists only while a model is traced")


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3])


@torch.library.custom_op("llmc::grouped_linear", mutates_args=())
def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    expert_ids: torch.Tensor,
    transposed: bool,
) -> torch.Tensor:
    """Each row times its expert's matrix.

    expert_ids `[T, X_k]`; x `[T, K]` (one row serves all of its token's experts) or `[T·X_k, K]`;
    weight `[X, M, K]`, or `[X, K, M]` if transposed; bias `[X, M]` or None -> `[T·X_k, M]`.
    """
    raise RuntimeError("llmc::grouped_linear exists only while a model is traced")


@grouped_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    expert_ids: torch.Tensor,
    transposed: bool,
) -> torch.Tensor:
    features = weight.shape[2] if transposed else weight.shape[1]
    return x.new_empty(expert_ids.shape[0] * expert_ids.shape[1], features)


def _attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention layers call under `attn_implementation="llmc"`."""
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedError(
            f"{type(module).__name__} attends to later tokens",
            hint="only decoders, whose tokens see those before them, can be compiled",
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedError(
            f"{type(module).__name__} does not say which layer it is",
            hint="its attention needs the attribute layer_idx that transformers' decoders have",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention(
        query, key, value, s_aux, layer, float(scale), sliding_window or 0, softcap or 0.0
    )
    return out, None


def _experts_function(
    self: Any,  # noqa: ANN401 - any experts module of transformers
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers' experts call under `experts_implementation="llmc"`.

    The activation stays traced.
    """
    names = ("gate_up_proj", "gate_up_proj_bias") if self.has_gate else ("up_proj", "up_proj_bias")
    biases = [getattr(self, n) if self.has_bias else None for n in (names[1], "down_proj_bias")]
    up = grouped_linear(
        hidden_states, getattr(self, names[0]), biases[0], top_k_index, self.is_transposed
    )
    inner = self._apply_gate(up) if self.has_gate else self.act_fn(up)
    down = grouped_linear(inner, self.down_proj, biases[1], top_k_index, self.is_transposed)
    if getattr(self, "has_post_expert_norm", False):
        down = self.post_expert_norm(down)
    weighted = down.view(*top_k_index.shape, down.shape[-1]) * top_k_weights[..., None]
    return weighted.sum(dim=1).to(hidden_states.dtype)


def register() -> None:
    """Makes `"llmc"` known to transformers as an attention and an experts implementation."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention_function)
    # No mask is ever built: causality and windows are attributes of the operator.
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, lambda *args, **kwargs: None)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_function)

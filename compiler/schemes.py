"""Quantization schemes: which format each weight gets, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llmc.errors import UnsupportedError, UsageError
from llmc.formats import FORMATS

# --kv -> type of the cache tensors; bfloat16 is stored as integers.
KV_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "uint16", "int8": "int8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A named choice of formats; weightBITSactivationBITS with the group as a suffix.

    matrices is the format of products, vocabulary that of embeddings and output projections,
    fallback that of matrices whose rows the group does not divide. keep takes each tensor's own
    format. activations is the type that products take theirs in: int8 with quantized weights,
    bfloat16 with bf16 ones (float32 where the target has no such products), or "best", which is
    int8 where the target has integer products and float32 elsewhere.
    """

    name: str
    matrices: str
    vocabulary: str
    fallback: str
    kv: str
    keep: bool = False
    activations: str = "float32"
    max_mean_abs: float  # what verify accepts, mean over positions, in nats
    max_abs: float  # of any position

    def resolved(
        self, target: str, narrow_products: frozenset[str], lacking: frozenset[str] = frozenset()
    ) -> Scheme:
        """The scheme on a target; raises UnsupportedError for int8 where it has no such products,
        and for formats that are `lacking` there.

        A scheme with the target's best activations becomes the one that names them.
        """
        if self.matrices in lacking:
            raise UnsupportedError(
                f"{self.name}: {target} has no products of {self.matrices} weights",
                hint="choose w8a16, which is as small and more exact",
            )
        if self.activations == "best":
            return SCHEMES[f"{self.name}-a8" if "int8" in narrow_products else f"{self.name}-a16"]
        if self.activations == "int8" and "int8" not in narrow_products:
            raise UnsupportedError(
                f"{self.name}: {target} has no dot products of bytes",
                hint=f"choose {self.name.replace('a8', 'a16')}, or a target level that has them",
            )
        if self.activations == "bfloat16" and "bfloat16" not in narrow_products:
            return replace(self, activations="float32")
        return self

    def choose(self, stored: Mapping[str, str]) -> FormatChooser:
        """The scheme's rule for a model whose tensors are stored as `stored` (name -> format)."""
        return FormatChooser(scheme=self, stored=stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatChooser:
    """Callable: (sources, input features, is vocabulary) -> name of a format."""

    scheme: Scheme
    stored: Mapping[str, str]

    def __call__(self, sources: list[str], features: int, is_vocabulary: bool) -> str:
        """The format for one weight."""
        if self.scheme.keep:
            return self._kept(sources)
        wanted = self.scheme.vocabulary if is_vocabulary else self.scheme.matrices
        fmt = FORMATS[wanted]
        if fmt.group and features % fmt.group:
            return self.scheme.fallback
        return wanted

    def _kept(self, sources: list[str]) -> str:
        """The stored format if all sources share it and the kernels know it, else float32."""
        formats = {self.stored.get(s, "f32") for s in sources}
        [only] = formats if len(formats) == 1 else {"f32"}
        return only if only in FORMATS else "f32"


def _scheme(name: str, matrices: str, vocabulary: str, **other: object) -> Scheme:
    defaults: dict[str, object] = {
        "fallback": "w8",
        "kv": "f16",
        "max_mean_abs": 0.02,
        "max_abs": 0.5,
    }
    chosen = {**defaults, **other}
    return Scheme(name=name, matrices=matrices, vocabulary=vocabulary, **chosen)  # type: ignore[arg-type]


# Rounding activations to bytes shows in the answers: 0.04 and 0.4 were measured on a small model.
_BYTES = {"max_mean_abs": 0.1, "max_abs": 1.5}

SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        _scheme("f32", "f32", "f32", fallback="f32", kv="f32", max_mean_abs=1e-3, max_abs=1e-2),
        _scheme("bf16", "bf16", "bf16", fallback="bf16", activations="bfloat16"),
        _scheme("f16", "f16", "f16", fallback="f16"),
        _scheme("w8a16", "w8", "w8"),
        _scheme("fp8", "fp8", "w8"),
        _scheme("w4a16-g32", "w4-g32", "w8"),
        _scheme("w4a16-g64", "w4-g64", "w8"),
        _scheme("w4a16-g128", "w4-g128", "w8"),
        _scheme("w4a16-g32-asym", "w4-g32-asym", "w8"),
        _scheme("w4a16-g64-asym", "w4-g64-asym", "w8"),
        _scheme("w4a16-g128-asym", "w4-g128-asym", "w8"),
        _scheme("w8a8", "w8", "w8", activations="int8", **_BYTES),
        _scheme("w4a8-g32", "w4-g32", "w8", activations="int8", **_BYTES),
        _scheme("w4a8-g64", "w4-g64", "w8", activations="int8", **_BYTES),
        _scheme("w4a8-g128", "w4-g128", "w8", activations="int8", **_BYTES),
        _scheme("w4a8-g32-asym", "w4-g32-asym", "w8", activations="int8", **_BYTES),
        _scheme("w4a8-g64-asym", "w4-g64-asym", "w8", activations="int8", **_BYTES),
        _scheme("w4a8-g128-asym", "w4-g128-asym", "w8", activations="int8", **_BYTES),
        _scheme("keep", "f32", "f32", keep=True, activations="best"),
        _scheme("keep-a8", "f32", "f32", keep=True, activations="int8", **_BYTES),
        _scheme("keep-a16", "f32", "f32", keep=True),
    )
}


def scheme_of(name: str) -> Scheme:
    """The scheme called `name`; raises UsageError naming those that exist."""
    try:
        return SCHEMES[name]
    except KeyError:
        raise UsageError(
            f"unknown quantization {name!r}", hint=f"choose one of {', '.join(SCHEMES)}"
        ) from None

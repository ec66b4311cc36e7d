"""Dot products of bytes: sixteen sums of 32 bits, each increased by four products.

Weight codes are unsigned in memory. Where an instruction multiplies signed bytes, codes of eight
bits have 128 taken off first, which integer.py settles by the sums of activation codes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.targets.cpu.layout import PANEL

Expr = Any
I32X16 = "int32x16"
CENTRE = 128
"""What signed dot products take off a code of eight bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteDot:
    """How an instruction set computes `sums += Σ four codes · four activation codes`.

    Either `intrinsic` is LLVM's for all sixteen sums, or `bytes_` (and `nibbles`, for codes of four
    bits, where those have a quicker way) is the body of a function in LLVM's language for `lanes`
    of them: of %s `<lanes x i32>`, %c and %x `<4 · lanes x i8>`, the codes and the activations;
    `declarations` are what it calls.
    """

    name: str
    intrinsic: str | None = None
    lanes: int = PANEL
    bytes_: str = ""
    nibbles: str | None = None
    declarations: str = ""
    signed: bool = False  # codes of eight bits are; below sixteen it makes no difference

    def scope(self) -> AbstractContextManager[Any]:
        """In which `apply` may be called."""
        if self.intrinsic is not None:
            return nullcontext()
        text = self.declarations + self._functions("bytes", self.bytes_)
        if self.nibbles is not None:
            text += self._functions("nibbles", self.nibbles)
        scope: AbstractContextManager[Any] = T.attr(
            tirx.IntImm("int32", 0), "pragma_import_llvm", text
        )
        return scope

    def apply(self, bits: int, total: Expr, codes: Expr, x: Expr) -> Expr:
        """total int32x16 plus codes uint8x64 times x int8x64, four at a time; `bits` of a code."""
        if self.intrinsic is not None:
            return T.call_llvm_pure_intrin(I32X16, self.intrinsic, total, codes, x)
        kind = "nibbles" if bits == 4 and self.nibbles is not None else "bytes"
        words = (T.reinterpret(I32X16, codes), T.reinterpret(I32X16, x))
        return tirx.call_pure_extern(I32X16, self._symbol(kind), total, *words)

    def _symbol(self, kind: str) -> str:
        return f"llmc_dot_{self.name}_{kind}"

    def _functions(self, kind: str, body: str) -> str:
        """`body` as a function, and one that applies it to sixteen sums, a register at a time."""
        n, symbol = self.lanes, self._symbol(kind)
        whole, part, bytes_ = f"<{PANEL} x i32>", f"<{n} x i32>", f"<{4 * n} x i8>"
        lines = []
        for i in range(PANEL // n):
            mask = _lanes(i * n, n)
            for v in "scx":
                lines.append(f"%{v}{i} = shufflevector {whole} %{v}, {whole} poison, {mask}")
            for v in "cx":
                lines.append(f"%{v}b{i} = bitcast {part} %{v}{i} to {bytes_}")
            values = f"{part} %s{i}, {bytes_} %cb{i}, {bytes_} %xb{i}"
            lines.append(f"%r{n}_{i} = call {part} @{symbol}_part({values})")
        while n < PANEL:  # pairs of results side by side
            for i in range(PANEL // n // 2):
                pair = ", ".join(f"<{n} x i32> %r{n}_{2 * i + j}" for j in range(2))
                lines.append(f"%r{2 * n}_{i} = shufflevector {pair}, {_lanes(0, 2 * n)}")
            n *= 2
        joined = "\n  ".join(lines)
        return f"""
define linkonce_odr {part} @{symbol}_part({part} %s, {bytes_} %c, {bytes_} %x) alwaysinline {{
{body}
}}
define linkonce_odr {whole} @{symbol}({whole} %s, {whole} %c, {whole} %x) alwaysinline {{
  {joined}
  ret {whole} %r{PANEL}_0
}}
"""


def _lanes(first: int, count: int) -> str:
    """A constant of `count` consecutive indices."""
    return f"<{count} x i32> <{', '.join(f'i32 {first + i}' for i in range(count))}>"


VPDPBUSD_512 = ByteDot(name="vpdpbusd_512", intrinsic="llvm.x86.avx512.vpdpbusd.512")
VPDPBUSD_256 = ByteDot(
    name="vpdpbusd_256",
    lanes=8,
    declarations="declare <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32>, <32 x i8>, <32 x i8>)",
    bytes_="""
  %r = call <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32> %s, <32 x i8> %c, <32 x i8> %x)
  ret <8 x i32> %r
""",
)


def _pairs(lanes: int, multiply: str, add: str, signs: str, declarations: str) -> ByteDot:
    """By instructions that multiply bytes and add pairs of products, saturating at 16 bits.

    2 · 15 · 127 fits into those, 2 · 255 · 127 does not. Codes of eight bits are therefore signed,
    |code| ≤ 128, and their signs move to the activations: `signs` makes %y of %c and %x.
    """
    sums, halves, bytes_ = f"<{lanes} x i32>", f"<{2 * lanes} x i16>", f"<{4 * lanes} x i8>"

    def body(codes: str, x: str) -> str:
        return f"""
  %p = call {halves} @{multiply}({bytes_} {codes}, {bytes_} {x})
  %q = call {sums} @{add}({halves} %p, {halves} splat (i16 1))
  %r = add {sums} %s, %q
  ret {sums} %r
"""

    magnitudes = f"%m = call {bytes_} @llvm.abs.v{4 * lanes}i8({bytes_} %c, i1 false)\n"
    return ByteDot(
        name=f"pmaddubsw_{32 * lanes}",
        lanes=lanes,
        signed=True,
        declarations=f"""{declarations}
declare {halves} @{multiply}({bytes_}, {bytes_})
declare {sums} @{add}({halves}, {halves})
declare {bytes_} @llvm.abs.v{4 * lanes}i8({bytes_}, i1)
""",
        nibbles=body("%c", "%x"),
        bytes_=magnitudes + signs + body("%m", "%y"),
    )


PMADDUBSW_512 = _pairs(
    16,
    "llvm.x86.avx512.pmaddubs.w.512",
    "llvm.x86.avx512.pmaddw.d.512",
    """
  %n = icmp slt <64 x i8> %c, zeroinitializer
  %z = sub <64 x i8> zeroinitializer, %x
  %y = select <64 x i1> %n, <64 x i8> %z, <64 x i8> %x
""",
    "",
)
PMADDUBSW_256 = _pairs(
    8,
    "llvm.x86.avx2.pmadd.ub.sw",
    "llvm.x86.avx2.pmadd.wd",
    "%y = call <32 x i8> @llvm.x86.avx2.psign.b(<32 x i8> %x, <32 x i8> %c)",
    "declare <32 x i8> @llvm.x86.avx2.psign.b(<32 x i8>, <32 x i8>)",
)
SDOT = ByteDot(
    name="sdot",
    lanes=4,
    signed=True,
    declarations="""
declare <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)
""",
    bytes_="""
  %r = call <4 x i32>
      @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32> %s, <16 x i8> %c, <16 x i8> %x)
  ret <4 x i32> %r
""",
)

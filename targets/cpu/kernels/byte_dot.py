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

from llmc.targets.building import i64, with_llvm
from llmc.targets.cpu.layout import PANEL

Expr = Any
I32X16 = "int32x16"
CENTRE = 128
"""What signed dot products take off a code of eight bits."""
_LARGEST = (1 << 15) - 1
_KEEP = "llmc_keep_in_memory"
_KEEP_TEXT = f"""
define linkonce_odr void @{_KEEP}(ptr %p) alwaysinline {{
  call void asm sideeffect "", "r,~{{memory}}"(ptr %p)
  ret void
}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteDot:
    """How an instruction set computes `sums += Σ four codes · four activation codes`.

    Either `intrinsic` is LLVM's for all sixteen sums, or `bytes_` is the body of a function in
    LLVM's language for `lanes` of them: of %s `<lanes x i32>`, %c and %x `<4 · lanes x i8>`, the
    codes and the activations; `declarations` are what it calls.

    Narrower codes may have a quicker way: `pairs` makes two sums of 16 bits of %c and %x, as many
    of which are added as fit, and `total` adds both of each sum to %s.
    """

    name: str
    intrinsic: str | None = None
    lanes: int = PANEL
    bytes_: str = ""
    pairs: str | None = None
    total: str = ""
    declarations: str = ""
    signed: bool = False  # codes of eight bits are; below that it makes no difference

    def scope(self) -> AbstractContextManager[Any]:
        """In which sums may be made."""
        if self.intrinsic is not None:
            return nullcontext()
        text = self.declarations + _KEEP_TEXT + self._functions("bytes", "scx", self.bytes_)
        if self.pairs is not None:
            text += self._functions("pairs", "pcx", self.pairs)
            text += self._functions("total", "sp", self.total)
        return with_llvm(text)

    def call(self, kind: str, *arguments: Expr) -> Expr:
        """One of the functions, of vectors of 512 bits."""
        words = [T.reinterpret(I32X16, argument) for argument in arguments]
        return tirx.call_extern(I32X16, self._symbol(kind), *words)

    def keep_in_memory(self, buffer: Expr) -> None:
        """Has LLVM leave vectors on the stack there, where it would rather move them about."""
        assert self.intrinsic is None, "its scope has no functions"
        T.evaluate(tirx.call_extern("void", _KEEP, T.address_of(buffer[i64(0), i64(0)])))

    def _symbol(self, kind: str) -> str:
        return f"llmc_dot_{self.name}_{kind}"

    def _functions(self, kind: str, arguments: str, body: str) -> str:
        """`body` as a function of %`arguments`, and one that applies it to vectors of 512 bits, a
        register at a time.
        """
        n, symbol = self.lanes, self._symbol(kind)
        whole, part = f"<{PANEL} x i32>", f"<{n} x i32>"
        types = {"s": part, "c": f"<{4 * n} x i8>", "x": f"<{4 * n} x i8>", "p": f"<{2 * n} x i16>"}
        lines = []
        for i in range(PANEL // n):
            values = []
            for v in arguments:
                mask = _lanes(i * n, n)
                lines.append(f"%{v}{i} = shufflevector {whole} %{v}, {whole} poison, {mask}")
                lines.append(f"%{v}t{i} = bitcast {part} %{v}{i} to {types[v]}")
                values.append(f"{types[v]} %{v}t{i}")
            lines.append(f"%r{n}_{i} = call {part} @{symbol}_part({', '.join(values)})")
        while n < PANEL:  # pairs of results side by side
            for i in range(PANEL // n // 2):
                pair = ", ".join(f"<{n} x i32> %r{n}_{2 * i + j}" for j in range(2))
                lines.append(f"%r{2 * n}_{i} = shufflevector {pair}, {_lanes(0, 2 * n)}")
            n *= 2
        joined = "\n  ".join(lines)
        of_part = ", ".join(f"{types[v]} %{v}" for v in arguments)
        of_whole = ", ".join(f"{whole} %{v}" for v in arguments)
        return f"""
define linkonce_odr {part} @{symbol}_part({of_part}) alwaysinline {{
{body}
}}
define linkonce_odr {whole} @{symbol}({of_whole}) alwaysinline {{
  {joined}
  ret {whole} %r{PANEL}_0
}}
"""


class ByteSum:
    """Sixteen sums int32 that products of codes of so many bits are added to."""

    def __init__(self, dot: ByteDot, code_bits: int, total: Expr) -> None:
        self._dot, self._total = dot, total
        self._fit = _LARGEST // (2 * ((1 << code_bits) - 1) * 127)  # sums of pairs in 16 bits
        if dot.pairs is None or code_bits == 8:
            self._fit = 0
        self._pairs: Expr | None = None
        self._count = 0

    def add(self, codes: Expr, x: Expr) -> None:
        """codes uint8x64 times x int8x64, four at a time."""
        dot = self._dot
        if dot.intrinsic is not None:
            total = T.call_llvm_pure_intrin(I32X16, dot.intrinsic, self._total, codes, x)
            self._total = T.Bind(total)
        elif self._fit == 0:
            self._total = T.Bind(dot.call("bytes", self._total, codes, x))
        else:
            before = T.broadcast(T.int32(0), PANEL) if self._pairs is None else self._pairs
            self._pairs = T.Bind(dot.call("pairs", before, codes, x))
            self._count += 1
            if self._count == self._fit:
                self.value()

    def value(self) -> Expr:
        """The sums so far, int32x16."""
        if self._pairs is not None:
            self._total = T.Bind(self._dot.call("total", self._total, self._pairs))
            self._pairs, self._count = None, 0
        return self._total


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

    Of codes of four bits eight such sums fit, 2 · 15 · 127 each, of six bits two. 2 · 255 · 127 is
    too much: codes of eight bits are therefore signed, |code| ≤ 128, and their signs move to the
    activations: `signs` makes %y of %c and %x.

    An empty line of assembly that is said to change a sum keeps LLVM to the order of the words. It
    would multiply row by row otherwise, and have no registers for all the codes of a unit.
    """
    kept = 'asm sideeffect "", "=v,0"'
    sums, halves, bytes_ = f"<{lanes} x i32>", f"<{2 * lanes} x i16>", f"<{4 * lanes} x i8>"
    total = f"""
  %q = call {sums} @{add}({halves} %p, {halves} splat (i16 1))
  %t = add {sums} %s, %q
  %r = call {sums} {kept}({sums} %t)
  ret {sums} %r
"""
    return ByteDot(
        name=f"pmaddubsw_{32 * lanes}",
        lanes=lanes,
        signed=True,
        declarations=f"""{declarations}
declare {halves} @{multiply}({bytes_}, {bytes_})
declare {sums} @{add}({halves}, {halves})
declare {bytes_} @llvm.abs.v{4 * lanes}i8({bytes_}, i1)
""",
        pairs=f"""
  %m = call {halves} @{multiply}({bytes_} %c, {bytes_} %x)
  %a = add {halves} %p, %m
  %b = bitcast {halves} %a to {sums}
  %r = call {sums} {kept}({sums} %b)
  ret {sums} %r
""",
        total=total,
        bytes_=f"""
  %m = call {bytes_} @llvm.abs.v{4 * lanes}i8({bytes_} %c, i1 false)
  {signs}
  %p = call {halves} @{multiply}({bytes_} %m, {bytes_} %y)
"""
        + total,
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

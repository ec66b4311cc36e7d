"""Kernels that do nothing but multiply and add: what one instruction can do here, for rooflines.

Independent sums hide the instruction's latency; operands stay in registers. The instruction
comes as a line of LLVM's language, because TVM turns bfloat16 vectors into integers on its way, and
LLVM's intrinsic then has the wrong types.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import argument, i64, on_stack, with_llvm
from llmc.targets.cpu.kernels import amx

TILE_CHAINS = amx.PANELS * amx.PANELS
_FUNCTION = "llmc_multiply_add"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakInstruction:
    """One multiply-accumulate instruction: `sum[lanes] += a · b`.

    Or, where sums are of 16 bits, a multiplication and an addition.
    """

    precision: str  # of the factors: "int8", "bf16" or "f32"
    machine: str  # platform.machine()
    feature: str  # as in /proc/cpuinfo
    mattr: str  # LLVM's name for it
    intrinsic: str
    lanes: int  # sums in a vector
    sum_bits: int = 32

    @property
    def words(self) -> int:
        """Of 32 bits in a vector."""
        return self.lanes * self.sum_bits // 32

    @property
    def chains(self) -> int:
        """Independent sums: with what is added to them they stay in registers."""
        return 10 if self.machine == "x86_64" and self.words < 16 else 16

    @property
    def factors(self) -> int:
        """Products added to one sum at once."""
        return {"int8": 4, "bf16": 2, "f32": 1}[self.precision] * self.sum_bits // 32

    @property
    def operations(self) -> int:
        """Multiplications and additions of one instruction."""
        return 2 * self.lanes * self.factors

    @property
    def sum_dtype(self) -> str:
        """Of the sums."""
        return f"int{self.sum_bits}" if self.precision == "int8" else "float32"

    def llvm(self, triple: str) -> str:
        """A module with a function `(sums, a, b) -> sums`, a and b as vectors of 32-bit words."""
        word, total = f"<{self.words} x i32>", f"<{self.lanes} x {self._llvm_type('sum')}>"
        factor = f"<{self.lanes * self.factors} x {self._llvm_type(self.precision)}>"
        types, values = [total, factor, factor], ["%s", "%x", "%y"]
        if self.precision == "f32":  # llvm.fma has the sum last
            types, values = [factor, factor, total], ["%x", "%y", "%s"]
        if self.sum_bits == 16:
            types, values = types[1:], values[1:]
        operands = ", ".join(f"{t} {v}" for t, v in zip(types, values, strict=True))
        call = f"call {total} @{self.intrinsic}({operands})"
        # A product that LLVM knew to be the same in every turn would leave the loop.
        pairs = f"""
  %c = call {word} asm sideeffect "", "=v,0"({word} %b)
  %y = bitcast {word} %c to {factor}
  %p = {call}
  %r = add {total} %s, %p"""
        direct = f"""
  %y = bitcast {word} %b to {factor}
  %r = {call}"""
        return f"""
target triple = "{triple}"
declare {total} @{self.intrinsic}({", ".join(types)})
define linkonce_odr {total} @{_FUNCTION}({total} %s, {word} %a, {word} %b) alwaysinline {{
  %x = bitcast {word} %a to {factor}{pairs if self.sum_bits == 16 else direct}
  ret {total} %r
}}
"""

    def _llvm_type(self, role: str) -> str:
        if role == "sum":
            role = f"i{self.sum_bits}" if self.precision == "int8" else "f32"
        return {"int8": "i8", "bf16": "bfloat", "f32": "float"}.get(role, role)


def _entry(*fields: str, lanes: int, sum_bits: int = 32) -> PeakInstruction:
    precision, machine, feature, mattr, intrinsic = fields
    return PeakInstruction(
        precision=precision,
        machine=machine,
        feature=feature,
        mattr=mattr,
        intrinsic=intrinsic,
        lanes=lanes,
        sum_bits=sum_bits,
    )


# The first that a machine has is its fastest for that precision.
INSTRUCTIONS = (
    _entry("int8", "x86_64", "avx512_vnni", "avx512vnni", "llvm.x86.avx512.vpdpbusd.512", lanes=16),
    _entry(
        *("int8", "x86_64", "avx512bw", "avx512bw", "llvm.x86.avx512.pmaddubs.w.512"),
        lanes=32,
        sum_bits=16,
    ),
    _entry("int8", "x86_64", "avx_vnni", "avxvnni", "llvm.x86.avx512.vpdpbusd.256", lanes=8),
    _entry("int8", "x86_64", "avx2", "avx2", "llvm.x86.avx2.pmadd.ub.sw", lanes=16, sum_bits=16),
    _entry(
        *("bf16", "x86_64", "avx512_bf16", "avx512bf16", "llvm.x86.avx512bf16.dpbf16ps.512"),
        lanes=16,
    ),
    _entry("f32", "x86_64", "avx512f", "avx512f", "llvm.fma.v16f32", lanes=16),
    _entry("f32", "x86_64", "fma", "fma", "llvm.fma.v8f32", lanes=8),
    _entry(
        *("int8", "aarch64", "asimddp", "dotprod", "llvm.aarch64.neon.sdot.v4i32.v16i8"), lanes=4
    ),
    _entry("bf16", "aarch64", "bf16", "bf16", "llvm.aarch64.neon.bfdot.v4f32.v8bf16", lanes=4),
    _entry("f32", "aarch64", "asimd", "neon", "llvm.fma.v4f32", lanes=4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileInstruction:
    """One product of matrix registers: sums `[16, 16]` of 64 bytes of factors each."""

    precision: str  # of the factors, as a PeakInstruction's
    feature: str
    name: str

    @property
    def factors(self) -> int:
        """Products added to one sum at once."""
        return {"int8": 64, "bf16": 32}[self.precision]

    @property
    def operations(self) -> int:
        """Multiplications and additions of one instruction."""
        return 2 * amx.TILE_ROWS * amx.TILE_ROWS * self.factors

    @property
    def sum_dtype(self) -> str:
        """Of the sums."""
        return "int32" if self.precision == "int8" else "float32"


TILE_INSTRUCTIONS = (
    TileInstruction(precision="int8", feature="amx_int8", name="tdpbssd"),
    TileInstruction(precision="bf16", feature="amx_bf16", name="tdpbf16ps"),
)


def tile_peak(instruction: TileInstruction, turns: int, tasks: int) -> tvm.tirx.PrimFunc:
    """`tasks` parallel loops of `turns` · TILE_CHAINS products of two tiles.

    Buffers: factors `[2, 16, 16]` int32 (any bits), sums `[tasks, TILE_CHAINS, 16, 16]`, which are
    set.
    """
    rows = amx.TILE_ROWS
    chains = [(g, p) for g in range(amx.PANELS) for p in range(amx.PANELS)]
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("peak")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            factors = argument("factors", (2, rows, rows), "int32")
            sums = argument("sums", (tasks, TILE_CHAINS, rows, rows), instruction.sum_dtype)
            tiles = (amx.activation_tile, amx.weight_tile)
            with T.parallel(i64(tasks)) as task:
                amx.configure(amx.TILE_BYTES)
                for side, tile in enumerate(tiles):
                    for i in range(amx.PANELS):
                        address = T.address_of(factors[i64(side), i64(0), i64(0)])
                        amx.load(tile(i), address, amx.TILE_BYTES)
                for g, p in chains:
                    amx.clear(amx.sum_tile(g, p))
                with T.serial(i64(turns)):
                    for g, p in chains:
                        x, w = amx.activation_tile(g), amx.weight_tile(p)
                        amx.multiply(instruction.name, amx.sum_tile(g, p), x, w)
                for i, (g, p) in enumerate(chains):
                    address = T.address_of(sums[task, i64(i), i64(0), i64(0)])
                    amx.store(amx.sum_tile(g, p), address, amx.TILE_BYTES)
                amx.release()
    return builder.get()


def peak(instruction: PeakInstruction, turns: int, tasks: int, triple: str) -> tvm.tirx.PrimFunc:
    """`tasks` parallel loops of `turns` · chains instructions.

    Buffers: factors `[2, words]` int32 (any bits), sums `[tasks, chains, lanes]`, which grow.
    """
    lanes, chains = instruction.lanes, instruction.chains
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("peak")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            factors = argument("factors", (2, instruction.words), "int32")
            sums = argument("sums", (tasks, chains, lanes), instruction.sum_dtype)
            with with_llvm(instruction.llvm(triple)), T.parallel(i64(tasks)) as task:
                _loop(instruction, turns, factors, sums, task)
    return builder.get()


def _loop(
    instruction: PeakInstruction,
    turns: int,
    factors: tvm.tirx.Buffer,
    sums: tvm.tirx.Buffer,
    task: tvm.tirx.Var,
) -> None:
    lanes, vector = instruction.lanes, f"{instruction.sum_dtype}x{instruction.lanes}"
    column = T.ramp(i64(0), i64(1), lanes)
    word = T.ramp(i64(0), i64(1), instruction.words)
    a, b = T.Bind(factors[i64(0), word]), T.Bind(factors[i64(1), word])
    local = on_stack((instruction.chains, lanes), instruction.sum_dtype)
    for chain in range(instruction.chains):
        T.buffer_store(local, sums[task, i64(chain), column], [i64(chain), column])
    with T.serial(i64(turns)):
        for chain in range(instruction.chains):
            total = T.call_extern(vector, _FUNCTION, local[i64(chain), column], a, b)
            T.buffer_store(local, total, [i64(chain), column])
    for chain in range(instruction.chains):
        T.buffer_store(sums, local[i64(chain), column], [task, i64(chain), column])

"""The functions of kernels: TIR's names, those of GLSL, and what each needs.

Kernels call GLSL's own functions by their names, in any target's kernels' spelling:

    T.call_pure_extern("float32", "subgroupAdd", x)          sum over the subgroup
    T.call_pure_extern("float32", "subgroupShuffleXor", x, mask)
    T.call_pure_extern("uint32", "gl_SubgroupSize")          a value, called without arguments
    T.call_pure_extern("float32x2", "unpackHalf2x16", bits)

A subgroup is as large as the device says; a kernel that presumes a size has to read
gl_SubgroupSize, and no two devices need have the same. TVM's `tvm_warp_shuffle…` mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass

_SHUFFLE = ("GL_KHR_shader_subgroup_shuffle", "subgroupShuffle")
_RELATIVE = ("GL_KHR_shader_subgroup_shuffle_relative", "subgroupShuffleRelative")
_ARITHMETIC = ("GL_KHR_shader_subgroup_arithmetic", "subgroupArithmetic")
_CLUSTERED = ("GL_KHR_shader_subgroup_clustered", "subgroupClustered")
_BALLOT = ("GL_KHR_shader_subgroup_ballot", "subgroupBallot")
_VOTE = ("GL_KHR_shader_subgroup_vote", "subgroupVote")
_BASIC = ("GL_KHR_shader_subgroup_basic", "subgroupBasic")


@dataclass(frozen=True, slots=True)
class Function:
    """A function of GLSL: the extension that brings it, the feature it needs, where it takes uint.

    extension and feature are empty where the core language has it.
    """

    name: str
    extension: str = ""
    feature: str = ""
    unsigned_argument: int | None = None  # the one that GLSL wants as uint
    is_value: bool = False


def _subgroup(names: str, kind: tuple[str, str], unsigned: int | None = None) -> list[Function]:
    return [Function(n, *kind, unsigned_argument=unsigned) for n in names.split()]


_REDUCTIONS = ("Add", "Mul", "Min", "Max", "And", "Or", "Xor")

_PLAIN = (
    *("abs", "bitCount", "bitfieldExtract", "clamp", "dot", "findLSB", "findMSB", "isinf", "isnan"),
    *("ldexp", "max", "min", "packHalf2x16", "packSnorm4x8", "packUnorm4x8"),
    *("unpackHalf2x16", "unpackSnorm4x8", "unpackUnorm4x8"),
)

# What `call_pure_extern` may name beyond TIR's own functions.
EXTERNS: dict[str, Function] = {
    f.name: f
    for f in (
        *_subgroup(" ".join(f"subgroup{r}" for r in _REDUCTIONS), _ARITHMETIC),
        *_subgroup(" ".join(f"subgroupInclusive{r}" for r in _REDUCTIONS), _ARITHMETIC),
        *_subgroup(" ".join(f"subgroupExclusive{r}" for r in _REDUCTIONS), _ARITHMETIC),
        *_subgroup(" ".join(f"subgroupClustered{r}" for r in _REDUCTIONS), _CLUSTERED, 1),
        *_subgroup("subgroupShuffle subgroupShuffleXor", _SHUFFLE, 1),
        *_subgroup("subgroupShuffleUp subgroupShuffleDown", _RELATIVE, 1),
        *_subgroup("subgroupBroadcast", _BALLOT, 1),
        *_subgroup("subgroupBroadcastFirst", _BALLOT),
        *_subgroup("subgroupAll subgroupAny", _VOTE),
        *_subgroup("subgroupBarrier subgroupElect", _BASIC),
        *(
            Function(n, *_BASIC, is_value=True)
            for n in (
                "gl_SubgroupSize",
                "gl_SubgroupInvocationID",
                "gl_SubgroupID",
                "gl_NumSubgroups",
            )
        ),
        *(Function(name) for name in _PLAIN),
    )
}

# TIR's warp functions: `(mask, value, lane, width, warp size)`.
WARP_SHUFFLES = {
    "tvm_warp_shuffle": EXTERNS["subgroupShuffle"],
    "tvm_warp_shuffle_up": EXTERNS["subgroupShuffleUp"],
    "tvm_warp_shuffle_down": EXTERNS["subgroupShuffleDown"],
    "tvm_warp_shuffle_xor": EXTERNS["subgroupShuffleXor"],
}

# Functions of floats by the C library's names; computed in float32.
MATH = {
    "acos": "acos",
    "acosh": "acosh",
    "asin": "asin",
    "asinh": "asinh",
    "atan": "atan",
    "atan2": "atan",
    "atanh": "atanh",
    "ceil": "ceil",
    "cos": "cos",
    "cosh": "cosh",
    "erf": "llmc_erf",
    "exp": "exp",
    "exp10": "llmc_exp10",
    "exp2": "exp2",
    "fabs": "abs",
    "floor": "floor",
    "fma": "fma",
    "log": "log",
    "log1p": "llmc_log1p",
    "log2": "log2",
    "log10": "llmc_log10",
    "nearbyint": "roundEven",
    "pow": "llmc_pow",
    "rint": "roundEven",
    "round": "llmc_round",
    "rsqrt": "inversesqrt",
    "sigmoid": "llmc_sigmoid",
    "sin": "sin",
    "sinh": "sinh",
    "sqrt": "sqrt",
    "tan": "tan",
    "tanh": "llmc_tanh",
    "trunc": "trunc",
}

# What GLSL lacks or leaves open. `%` on negative integers is undefined there.
HELPERS = {
    "llmc_erf": """
float llmc_erf(float x) {  // Abramowitz and Stegun 7.1.26; below 0.5 a series, which keeps digits
  float a = abs(x), s = x * x;
  if (a < 0.5) return x * (1.1283791671 + s * (-0.3761263890 + s * (0.1128379167
      + s * (-0.0268661706 + s * (0.0052239776 - s * 0.0008548327)))));
  float t = 1.0 / (1.0 + 0.3275911 * a);
  float y = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741
      + t * (-1.453152027 + t * 1.061405429))));
  return sign(x) * (1.0 - y * exp(-s));
}""",
    "llmc_exp10": "float llmc_exp10(float x) { return exp2(x * 3.3219280949); }",
    "llmc_log10": "float llmc_log10(float x) { return log2(x) * 0.30102999566; }",
    "llmc_log1p": """
float llmc_log1p(float x) {  // Kahan: what 1 + x loses of x is made good
  float u = 1.0 + x;
  return u == 1.0 ? x : log(u) * (x / (u - 1.0));
}""",
    "llmc_pow": """
float llmc_pow(float x, float y) {  // of negative x too, which GLSL's own does not define
  float p = pow(abs(x), y);
  float half_y = 0.5 * trunc(y);
  return y == 0.0 ? 1.0 : x < 0.0 && half_y != floor(half_y) ? -p : p;
}""",
    "llmc_round": "float llmc_round(float x) { return sign(x) * floor(abs(x) + 0.5); }",
    "llmc_sigmoid": "float llmc_sigmoid(float x) { return 1.0 / (1.0 + exp(-x)); }",
    # Made of exponentials, tanh of a large number would be a quotient of infinities.
    "llmc_tanh": "float llmc_tanh(float x) { return tanh(clamp(x, -15.0, 15.0)); }",
    "llmc_mod": "int llmc_mod(int a, int b) { return a - a / b * b; }",
    "llmc_floordiv": """
int llmc_floordiv(int a, int b) {
  int q = a / b;
  return q * b != a && (a < 0) != (b < 0) ? q - 1 : q;
}""",
    "llmc_floormod": """
int llmc_floormod(int a, int b) {
  int r = a - a / b * b;
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}""",
}

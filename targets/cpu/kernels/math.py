"""Vector exp, tanh, erf and sigmoid as expressions: LLVM would call libm once a lane for its own.

Each function takes a float32 expression of any lane count (a `tirx` scalar or vector) and returns
one of the same type made of additions, products and bit operations only. They are meant for the
vectorizer: no branch, no call. Polynomials: exp after Cephes `expf`; tanh and erf are the clamped
rational minimax forms that Eigen uses.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import PrimType

_EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
    1.0,
    1.0,
)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; n · HIGH is exact

EXP2_LOWEST = -50.0  # a million such weights beside one of 1 do not reach float32's last bit
# Minimax for 2^f on [-1/2, 1/2], error 9e-8; 1 at 0.
_EXP2_COEFFICIENTS = (
    1.3264727213708367e-3,
    9.671512812493833e-3,
    5.550733744824668e-2,
    2.402224208267749e-1,
    6.931469775973307e-1,
    1.0,
)

_TANH_CLAMP = 7.90531110763549805  # beyond it tanh is 1 in float32
_TANH_NUMERATOR = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_DENOMINATOR = (
    1.19825839466702e-06,
    1.18534705686654e-04,
    2.26843463243900e-03,
    4.89352518554385e-03,
)

_ERF_CLAMP = 4.0  # beyond it erf is 1 in float32
_ERF_NUMERATOR = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_DENOMINATOR = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def exp(x: tirx.Expr) -> tirx.Expr:
    """e^x within 2 ulp for -87 <= x <= 88; 0 from -87.7 down to -inf, inf above 88.4."""

    def scaled(n: tirx.Expr, r: tirx.Expr) -> tirx.Expr:
        lanes = x.ty.dtype.lanes
        exponent = tirx.Cast(_vector("int32", lanes), n) + _splat(127, lanes, "int32")
        # n = -127 gives the bits of 0.0, which is how -inf becomes an exact zero.
        power = tirx.reinterpret(x.ty, tirx.shift_left(exponent, _splat(23, lanes, "int32")))
        return _polynomial(_EXP_COEFFICIENTS, r) * power

    def reduced(y: tirx.Expr) -> tirx.Expr:
        nearest = tirx.floor(y * _like(1.44269504088896341, x) + _like(0.5, x))
        return _let(
            nearest,
            lambda n: _let(
                y - n * _like(_LN2_HIGH, x) - n * _like(_LN2_LOW, x), lambda r: scaled(n, r)
            ),
        )

    return _let(tirx.max(tirx.min(x, _like(88.7, x)), _like(-88.0, x)), reduced)


def exp2(x: tirx.Expr) -> tirx.Expr:
    """2^x within 3 ulp for EXP2_LOWEST <= x < 127.5; 2^EXP2_LOWEST below, down to -inf.

    The cheapest form, for softmax: its weights never are exactly zero. Nor are they so small that
    their products are denormal, which take processors a hundred times longer.
    """
    lanes = x.ty.dtype.lanes
    int32 = _vector("int32", lanes)

    def scaled(whole: tirx.Expr, y: tirx.Expr) -> tirx.Expr:
        power = _let(y - whole, lambda f: _polynomial(_EXP2_COEFFICIENTS, f))
        # Added to the exponent.
        bits = tirx.shift_left(tirx.Cast(int32, whole), _splat(23, lanes, "int32"))
        return tirx.reinterpret(x.ty, tirx.reinterpret(int32, power) + bits)

    return _let(
        tirx.max(x, _like(EXP2_LOWEST, x)),
        lambda y: _let(nearest(y), lambda whole: scaled(whole, y)),
    )


def nearest(x: tirx.Expr) -> tirx.Expr:
    """The integer next to x, ties to even, as float."""
    return tirx.nearbyint(x)


def sigmoid(x: tirx.Expr) -> tirx.Expr:
    """1 / (1 + e^-x) within 4 ulp; 0 below -88.4."""
    return _like(1.0, x) / (_like(1.0, x) + exp(_like(0.0, x) - x))


def tanh(x: tirx.Expr) -> tirx.Expr:
    """Hyperbolic tangent within 8 ulp, odd and exact at 0."""
    return _odd_rational(x, _TANH_CLAMP, _TANH_NUMERATOR, _TANH_DENOMINATOR)


def erf(x: tirx.Expr) -> tirx.Expr:
    """Error function within 8 ulp, odd and exact at 0."""
    return _odd_rational(x, _ERF_CLAMP, _ERF_NUMERATOR, _ERF_DENOMINATOR)


def silu(x: tirx.Expr) -> tirx.Expr:
    """The swish function, x · sigmoid(x)."""
    return x / (_like(1.0, x) + exp(_like(0.0, x) - x))


def gelu(x: tirx.Expr) -> tirx.Expr:
    """The exact form, x · Φ(x), by the error function."""
    return x * _like(0.5, x) * (_like(1.0, x) + erf(x * _like(0.70710678118654752, x)))


def gelu_tanh(x: tirx.Expr) -> tirx.Expr:
    """The tanh approximation of gelu (Hendrycks and Gimpel, 2016).

    Half of 1 + tanh(u) is sigmoid(2u), which loses nothing where tanh is near -1.
    """
    twice = x * _like(2 * 0.79788456080286536, x) * (_like(1.0, x) + _like(0.044715, x) * x * x)
    return x * sigmoid(twice)


def relu(x: tirx.Expr) -> tirx.Expr:
    """max(x, 0)."""
    return tirx.max(x, _like(0.0, x))


def lane_sum(x: tirx.Expr) -> tirx.Expr:
    """Sum of a vector's lanes (a power of two of them), by halves; a scalar float32."""
    return _fold_lanes(x, lambda a, b: a + b)


def lane_max(x: tirx.Expr) -> tirx.Expr:
    """Largest of a vector's lanes (a power of two of them), by halves; a scalar float32."""
    return _fold_lanes(x, tirx.max)


def fold_integers(kind: str, x: tirx.Expr) -> tirx.Expr:
    """The lanes of an int32 vector brought together, by LLVM's name ("smax", "smin", "add")."""
    lanes = x.ty.dtype.lanes
    if lanes == 1:
        return x
    name = f"llvm.vector.reduce.{kind}.v{lanes}i32"
    return tirx.call_llvm_pure_intrin("int32", name, x)


def _fold_lanes(x: tirx.Expr, combine: Callable[[tirx.Expr, tirx.Expr], tirx.Expr]) -> tirx.Expr:
    lanes = x.ty.dtype.lanes
    if lanes == 1:
        return x
    half = _vector("float32", lanes // 2)
    if lanes == 2:
        return _let(
            x,
            lambda v: combine(
                tirx.Shuffle([v], [tirx.const(0, "int32")]),
                tirx.Shuffle([v], [tirx.const(1, "int32")]),
            ),
        )
    return _let(
        x,
        lambda v: _fold_lanes(combine(tirx.vectorlow(half, v), tirx.vectorhigh(half, v)), combine),
    )


def _odd_rational(
    x: tirx.Expr, clamp: float, numerator: tuple[float, ...], denominator: tuple[float, ...]
) -> tirx.Expr:
    """The function y · P(y²) / Q(y²) of y = x clamped to ±clamp."""

    def of_square(y: tirx.Expr) -> tirx.Expr:
        return _let(y * y, lambda s: y * _polynomial(numerator, s) / _polynomial(denominator, s))

    return _let(tirx.max(tirx.min(x, _like(clamp, x)), _like(-clamp, x)), of_square)


def _polynomial(coefficients: tuple[float, ...], x: tirx.Expr) -> tirx.Expr:
    """Horner's scheme, highest power first."""
    value = _like(coefficients[0], x)
    for coefficient in coefficients[1:]:
        value = value * x + _like(coefficient, x)
    return value


def _let(value: tirx.Expr, body: Callable[[tirx.Expr], tirx.Expr]) -> tirx.Expr:
    """Names `value`, so that an expression that uses it often is not written out each time."""
    var = tirx.Var("v", value.ty)
    return tirx.Let(var, value, body(var))


def _vector(dtype: str, lanes: int) -> PrimType:
    return PrimType(dtype if lanes == 1 else f"{dtype}x{lanes}")


def _splat(value: float, lanes: int, dtype: str) -> tirx.Expr:
    scalar = tirx.const(value, dtype)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def _like(value: float, x: tirx.Expr) -> tirx.Expr:
    return _splat(value, x.ty.dtype.lanes, "float32")

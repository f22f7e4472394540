"""THE table of vector functions that kernels call, as straight-line LLVM: `FUNCTIONS`, bounds of their errors in `ULP`.

Elementary functions come from `elementary`; here are powers, error and gamma functions, steps and comparisons. Special
values are torch's. Compile-time parameters (`n` of powi, `decimals` of round) are Python integers after the operands.
Source for erfc: M. Shepherd, J. Laframboise, Math. Comp. 36 (1981) 249.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pullback.kernels.codegen.builder import Builder
from pullback.kernels.codegen.elementary import (
    LN2,
    TABLE,
    acos,
    asin,
    asinh,
    atan,
    atan2,
    cosh,
    exp,
    exp2,
    expm1,
    flag,
    horner,
    log,
    log1p,
    log2,
    minus_product,
    polynomial,
    product,
    relu,
    sigmoid,
    sin_cos_reduced,
    sinc,
    sine,
    sinh,
    softplus,
    special_log,
    split_log,
    tan,
    tanh,
    xlogx,
)

# Bounds of the error in units in the last place, (float32, float64), with a tenth to spare over what 10^5 (float32) and
# 3000 (float64, by mpmath) points showed: sines for |x| <= 10^4 (absolute errors beyond: 10^-6 up to 10^8 in float32,
# 10^-15 up to 10^15 in float64, 10^-14 without fma); lgamma, digamma and trigamma relative to max(1, |value|); powi for
# |n| > 3, else |n|. What is not listed is exactly rounded.
ULP: dict[str, tuple[float, float]] = {
    "exp": (2.0, 0.9),
    "exp2": (1.1, 1.0),
    "expm1": (1.8, 1.8),
    "sigmoid": (3.6, 2.1),
    "softplus": (3.6, 1.8),
    "log": (1.0, 0.9),
    "log2": (2.4, 1.6),
    "log1p": (1.6, 1.2),
    "xlogx": (1.7, 1.5),
    "sin": (1.7, 1.6),
    "cos": (1.6, 1.5),
    "tan": (3.4, 3.1),
    "sinc": (2.5, 2.4),
    "asin": (2.1, 2.1),
    "acos": (1.4, 1.3),
    "atan": (2.0, 2.0),
    "atan2": (2.3, 2.1),
    "sinh": (2.7, 1.5),
    "cosh": (2.5, 1.4),
    "tanh": (2.5, 2.1),
    "asinh": (2.0, 1.6),
    "erf": (1.9, 1.2),
    "erfc": (3.3, 3.1),
    "lgamma": (0.6, 4.0),
    "digamma": (0.6, 6.0),
    "trigamma": (0.6, 5.0),
    "pow": (0.6, 1.0),
    "powi": (1.5, 1.5),
    "rsqrt": (1.5, 1.5),
}


def _in_double(function: Callable[..., str]) -> Callable[..., str]:
    """Evaluate in double and round: for rare functions whose float variant would not be worth its lines."""

    def wrapped(b: Builder, *args: str) -> str:
        if b.double:
            return function(b, *args)
        d = b.like("double")
        return d.fptrunc(function(d, *(b.fpext(x) for x in args)))

    return wrapped


# Powers -------------------------------------------------------------------------------------------------------------


def _log_extended(b: Builder, x: str) -> tuple[str, str]:
    """log(x) in two parts, error 2^-63 relative, for positive x in double: the plain formula in double-double."""
    e, f = split_log(b, x)
    two = b.const(2)
    d = b.fadd(f, two)
    d_low = b.fsub(f, b.fsub(d, two))
    s = b.fdiv(f, d)
    s_low = b.fdiv(minus_product(b, minus_product(b, f, s, d), s, d_low), d)
    z, z_low = product(b, s, s)
    z_low = b.fma(b.fadd(s, s), s_low, z_low)
    third, *rest = TABLE["log", "double"]
    tail = b.fmul(z, horner(b, rest, z))
    k = b.fadd(b.const(third), tail)
    k_low = b.fadd(b.fsub(tail, b.fsub(k, b.const(third))), b.const(3.700743415417188e-17))  # 2/3 - third
    t, t_low = product(b, z, k)
    t_low = b.fadd(t_low, b.fma(z, k_low, b.fmul(z_low, k)))
    w = b.fadd(two, t)
    w_low = b.fadd(b.fsub(t, b.fsub(w, two)), t_low)
    m, m_low = product(b, s, w)
    m_low = b.fadd(m_low, b.fma(s, w_low, b.fmul(s_low, w)))
    a = b.fmul(e, b.const(LN2[0]))  # exact, and zero or larger than m
    high = b.fadd(a, m)
    low = b.fadd(b.fsub(m, b.fsub(high, a)), b.fma(e, b.const(LN2[1]), m_low))
    return special_log(b, x, high), low


def _pow_double(b: Builder, x: str, y: str) -> str:
    a = b.abs(x)
    high, low = _log_extended(b, a)
    p, p_low = product(b, y, high)
    if not b.has_fma:
        p_low = b.select(b.fcmp("ord", p_low, p_low), p_low, b.const(0))  # the splitting overflows for huge y
    p_low = b.fma(y, low, p_low)
    moderate = b.fcmp("olt", b.abs(p), b.const(760))
    r = exp(b, p, tail=b.select(moderate, p_low, b.const(0)))
    half = b.fmul(y, b.const(0.5))
    integer = b.fcmp("oeq", b.rint(y), y)
    odd = b.mask_and(integer, b.fcmp("une", b.rint(half), half))
    r = b.select(odd, b.copysign(r, x), r)
    finite_negative = b.mask_and(b.fcmp("olt", x, b.const(0)), b.fcmp("ogt", x, b.const(-math.inf)))
    finite_y = b.fcmp("olt", b.abs(y), b.const(math.inf))
    outside = b.mask_and(finite_negative, b.mask_and(finite_y, b.mask_not(integer)))
    r = b.select(outside, b.const(math.nan), r)
    minus_one_to_inf = b.mask_and(b.fcmp("oeq", a, b.const(1)), b.fcmp("oeq", b.abs(y), b.const(math.inf)))
    one = b.mask_or(b.fcmp("oeq", x, b.const(1)), b.fcmp("oeq", y, b.const(0)))
    return b.select(b.mask_or(one, minus_one_to_inf), b.const(1), r)


def _powi(b: Builder, x: str, n: int) -> str:
    """By squaring; the rounding errors are carried along if |n| > 3. `n` is known when the kernel is built."""
    if n == 0:
        return b.const(1)
    square: list[str] = [x]  # the value or, if exact, value and error
    exact = abs(n) > 3
    if n < 0:
        square = [b.fdiv(b.const(1), x)]
        if exact:
            square.append(b.fmul(square[0], minus_product(b, b.const(1), square[0], x)))
    power: list[str] = []
    for k in range(abs(n).bit_length()):
        if k:
            square = _times(b, square, square, exact)
        if abs(n) >> k & 1:
            power = _times(b, power, square, exact) if power else square
    if not exact:
        return power[0]
    total = b.fadd(power[0], power[1])  # over- and underflow leave nan or +0 in the error
    return b.select(b.fcmp("one", total, b.const(0)), total, power[0])


def _times(b: Builder, x: list[str], y: list[str], exact: bool) -> list[str]:
    if not exact:
        return [b.fmul(x[0], y[0])]
    p, e = product(b, x[0], y[0])
    for high, low in (x[0], y[1:]), (y[0], x[1:]):
        if low:
            e = b.fma(high, low[0], e)
    return [p, e]


def _rsqrt(b: Builder, x: str) -> str:
    return b.select(b.fcmp("oeq", x, b.const(0)), b.const(0), b.fdiv(b.const(1), b.sqrt(x)))


# Error function -----------------------------------------------------------------------------------------------------


def _erf(b: Builder, x: str) -> str:
    """By x + x P(x^2) for |x| < 1, else 1 - exp(-T(|x|)); one from |x| = 4 (float) or 6 on."""
    a = b.abs(x)
    small = b.fcmp("olt", a, b.const(1))
    z = b.fmul(a, a)
    inner = b.fma(a, polynomial(b, "erf", z), a)
    end = b.const(6.0 if b.double else 4.0)
    u = b.select(b.fcmp("ogt", a, end), end, a)
    outer = b.fsub(b.const(1), exp(b, b.fneg(polynomial(b, "erf_tail", u))))
    return b.copysign(b.select(small, inner, outer), x)


def _erfc(b: Builder, x: str) -> str:
    """1 - erf(x) for a = |x| < 1/2, else e^(-a^2) Q((a - k) / (a + k)) / (1 + 2 a), and 2 minus that for x < 0."""
    a, one = b.abs(x), b.const(1)
    inner = b.fsub(one, b.fma(x, polynomial(b, "erf", b.fmul(x, x)), x))
    end, k = (b.const(28.0), b.const(3)) if b.double else (b.const(11.0), b.const(2))
    u = b.select(b.fcmp("ogt", a, end), end, a)
    z, z_low = product(b, u, u)
    gauss = exp(b, b.fneg(z), tail=b.fneg(z_low))
    q = polynomial(b, "erfc", b.fdiv(b.fsub(u, k), b.fadd(u, k)))
    y = b.fdiv(b.fmul(gauss, q), b.fma(b.const(2), u, one))
    y = b.select(b.fcmp("olt", x, b.const(0)), b.fsub(b.const(2), y), y)
    return b.select(b.fcmp("olt", a, b.const(0.5)), inner, y)


# Gamma function -----------------------------------------------------------------------------------------------------


# B_2, B_4, ...
_BERNOULLI = [1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798]
_BERNOULLI += [-174611 / 330, 854513 / 138]


def _sin_cos_pi(b: Builder, a: str) -> tuple[str, str]:
    """(sin(pi f) / pi, cos(pi f)), f = a - nearest integer; the sine is exactly zero at integers."""
    f = b.fsub(a, b.rint(a))
    t = b.abs(f)
    swap = b.fcmp("ogt", t, b.const(0.25))
    u = b.select(swap, b.fsub(b.const(0.5), t), t)
    r = b.fmul(u, b.const(math.pi))
    z = b.fmul(r, r)
    s = b.fma(b.fmul(u, z), polynomial(b, "sin", z), u)
    _, c = sin_cos_reduced(b, r)
    sine = b.select(swap, b.fmul(c, b.const(1 / math.pi)), s)
    return b.copysign(sine, f), b.select(swap, b.fmul(s, b.const(math.pi)), c)


def _reflect(b: Builder, x: str) -> tuple[str, str, str]:
    """(mask x < 0, |x|, 1 + |x| where x < 0 else x): f(x) by f(1 - x)."""
    negative, a = b.fcmp("olt", x, b.const(0)), b.abs(x)
    return negative, a, b.select(negative, b.fadd(a, b.const(1)), x)


def _lgamma_double(b: Builder, x: str) -> str:
    """By a shift to [3/2, 5/2] below 8, Stirling's series above, and reflection below 0."""
    one = b.const(1)
    negative, a, y = _reflect(b, x)
    low, middle = b.fcmp("olt", y, b.const(0.5)), b.fcmp("olt", y, b.const(1.5))
    f = b.select(low, y, b.fsub(y, b.select(middle, one, b.const(2))))
    factor = b.select(low, b.fmul(y, b.fadd(y, one)), b.select(middle, y, one))
    for _ in range(6):
        above = b.fcmp("ogt", f, b.const(0.5))
        factor = b.select(above, b.fmul(factor, b.fadd(f, one)), factor)
        f = b.select(above, b.fsub(f, one), f)
    big = b.fcmp("oge", y, b.const(8))
    logarithm = log(b, b.select(big, y, factor))
    near = b.fma(f, polynomial(b, "lgamma", f), b.select(middle, b.fneg(logarithm), logarithm))
    w = b.fdiv(one, y)
    stirling = [_BERNOULLI[k] / ((2 * k + 1) * (2 * k + 2)) for k in range(9)]
    series = b.fma(horner(b, stirling, b.fmul(w, w)), w, b.const(0.5 * math.log(2 * math.pi) - 0.5))
    far = b.fma(b.fsub(y, b.const(0.5)), b.fsub(logarithm, one), series)
    value = b.select(big, far, near)
    sine = b.abs(_sin_cos_pi(b, a)[0])
    reflected = b.fsub(log(b, b.fdiv(one, sine)), value)
    reflected = b.select(b.fcmp("oeq", b.rint(a), a), b.const(math.inf), reflected)
    return b.select(negative, reflected, value)


def _eight_factors(b: Builder, x: str) -> tuple[str, list[str]]:
    """(t, u): t = x (x + 7) and the four u_k = (x + k) (x + 7 - k) = t + k (7 - k)."""
    t = b.fmul(x, b.fadd(x, b.const(7)))
    return t, [t] + [b.fadd(t, b.const(k * (7 - k))) for k in (1, 2, 3)]


def _digamma_double(b: Builder, x: str) -> str:
    """The derivative of lgamma: 1/x + ... + 1/(x + 7) where x < 8, then log y - 1/(2y) - sum B_2k / (2k y^2k)."""
    one, zero = b.const(1), b.const(0)
    negative, a, x = _reflect(b, x)
    below = b.fcmp("olt", x, b.const(8))
    t, u = _eight_factors(b, x)
    p, q = b.fmul(u[0], u[1]), b.fmul(u[2], u[3])
    numerator = b.fma(b.fma(b.const(2), t, b.const(6)), q, b.fmul(b.fma(b.const(2), t, b.const(22)), p))
    poles = b.fdiv(b.fmul(b.fma(b.const(2), x, b.const(7)), numerator), b.fmul(p, q))
    y = b.select(below, b.fadd(x, b.const(8)), x)
    w = b.fdiv(one, y)
    z = b.fmul(w, w)
    series = b.fmul(z, horner(b, [c / (2 * k + 2) for k, c in enumerate(_BERNOULLI[:10])], z))
    value = b.fsub(b.fsub(log(b, y), b.fma(w, b.const(0.5), series)), b.select(below, poles, zero))
    sine, cosine = _sin_cos_pi(b, a)
    reflected = b.fadd(b.fdiv(cosine, sine), value)
    reflected = b.select(b.fcmp("oeq", sine, zero), b.const(math.nan), reflected)
    return b.select(negative, reflected, value)


def _trigamma_double(b: Builder, x: str) -> str:
    """The second derivative of lgamma, as digamma; inf at 0, -1, -2, ..."""
    one, two = b.const(1), b.const(2)
    negative, a, x = _reflect(b, x)
    below = b.fcmp("olt", x, b.const(8))
    t, u = _eight_factors(b, x)
    squares = [b.fmul(v, v) for v in u]
    parts = [
        b.fma(two, t, b.const(49 - 2 * k * (7 - k))) for k in range(4)
    ]  # 1/(x + k)^2 + 1/(x + 7 - k)^2 = part / square
    poles = [
        b.fdiv(b.fma(parts[k], squares[k + 1], b.fmul(parts[k + 1], squares[k])), b.fmul(squares[k], squares[k + 1]))
        for k in (0, 2)
    ]
    y = b.select(below, b.fadd(x, b.const(8)), x)
    w = b.fdiv(one, y)
    z = b.fmul(w, w)
    series = b.fma(b.fmul(w, z), horner(b, _BERNOULLI, z), b.fmul(z, b.const(0.5)))
    value = b.fadd(w, b.fadd(series, b.select(below, b.fadd(*poles), b.const(0))))
    sine, _ = _sin_cos_pi(b, a)
    reflected = b.fsub(b.fdiv(one, b.fmul(sine, sine)), value)
    return b.select(negative, reflected, value)


# Steps, comparisons, choices ----------------------------------------------------------------------------------------


def _sign(b: Builder, x: str) -> str:
    return b.fsub(flag(b, b.fcmp("ogt", x, b.const(0))), flag(b, b.fcmp("olt", x, b.const(0))))


def _step(b: Builder, x: str) -> str:
    return b.select(b.fcmp("olt", x, b.const(0)), b.const(0), b.const(1))


def _round(b: Builder, x: str, decimals: int = 0) -> str:
    if decimals == 0:
        return b.rint(x)
    scale = b.const(10.0 ** abs(decimals))
    into, out = (b.fmul, b.fdiv) if decimals > 0 else (b.fdiv, b.fmul)
    return out(b.rint(into(x, scale)), scale)


def _mod(b: Builder, x: str, n: str, d: str) -> str:
    return b.fsub(x, b.fmul(n, b.floor(b.fdiv(b.fsub(x, d), n))))


def _choice(pred: str) -> Callable[..., str]:
    """Minimum ("ole") or maximum ("oge"): the first in ties, nan where one is nan."""

    def function(b: Builder, x: str, y: str) -> str:
        return b.select(b.fcmp("uno", x, x), x, b.select(b.fcmp(pred, x, y), x, y))

    return function


def _comparison(pred: str) -> Callable[..., str]:
    return lambda b, x, y: flag(b, b.fcmp(pred, x, y))


def _truth(b: Builder, x: str) -> str:
    return b.fcmp("une", x, b.const(0))


FUNCTIONS: dict[str, Callable[..., str]] = {
    "exp": exp,
    "exp2": exp2,
    "expm1": expm1,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "log": log,
    "log2": log2,
    "log1p": log1p,
    "xlogx": xlogx,
    "sin": lambda b, x: sine(b, x, 0),
    "cos": lambda b, x: sine(b, x, 1),
    "tan": tan,
    "sinc": sinc,
    "asin": asin,
    "acos": acos,
    "atan": atan,
    "atan2": atan2,
    "sinh": sinh,
    "cosh": cosh,
    "tanh": tanh,
    "asinh": asinh,
    "erf": _erf,
    "erfc": _erfc,
    "lgamma": _in_double(_lgamma_double),
    "digamma": _in_double(_digamma_double),
    "trigamma": _in_double(_trigamma_double),
    "pow": _in_double(_pow_double),
    "powi": _powi,
    "sqrt": Builder.sqrt,
    "rsqrt": _rsqrt,
    "inv": lambda b, x: b.fdiv(b.const(1), x),
    "square": lambda b, x: b.fmul(x, x),
    "fadd": Builder.fadd,
    "fsub": Builder.fsub,
    "fmul": Builder.fmul,
    "fdiv": Builder.fdiv,
    "fneg": Builder.fneg,
    "abs": Builder.abs,
    "floor": Builder.floor,
    "ceil": Builder.ceil,
    "trunc": Builder.trunc,
    "round": _round,
    "mod": _mod,
    "sign": _sign,
    "step": _step,
    "relu": relu,
    "minimum": _choice("ole"),
    "maximum": _choice("oge"),
    "where": lambda b, c, x, y: b.select(_truth(b, c), x, y),
    "eq": _comparison("oeq"),
    "ne": _comparison("une"),
    "lt": _comparison("olt"),
    "le": _comparison("ole"),
    "logical_and": lambda b, x, y: flag(b, b.mask_and(_truth(b, x), _truth(b, y))),
    "logical_or": lambda b, x, y: flag(b, b.mask_or(_truth(b, x), _truth(b, y))),
    "logical_not": lambda b, x: flag(b, b.fcmp("oeq", x, b.const(0))),
}

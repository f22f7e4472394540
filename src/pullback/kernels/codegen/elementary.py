"""Exponentials, logarithms and circular functions of vectors as straight-line LLVM: no branch, no table, no libm call.

Each function takes a `Builder` and operands, reduces its argument to a short interval and ends in one polynomial there.
Bounds of the errors are in `vecmath.ULP`; special values (signed zeros, infinities, nan, arguments outside the domain)
are those of torch. Notation: r, f, t, z are reduced arguments, n and e integers kept in floats.

Sources of the reductions: W. Cody, W. Waite, Software manual for the elementary functions (1980); J.-M. Muller,
Elementary functions (2016). Error-free products: T. Dekker, Numer. Math. 18 (1971) 224.
"""

from __future__ import annotations

import math

from pullback.kernels.codegen.builder import Builder

# Polynomials in ascending powers, relative minimax fits (Lawson iteration at 60 digits, float ones rounded coefficient
# after coefficient and refitted) of, by name:
#   exp       (e^r - 1) / r                for |r| <= log(2) / 2; float: error counted in ulp, twice as large for r < 0
#   expm1     (e^r - 1 - r) / r^2          for |r| <= log(2) / 2
#   log       float: (log(1 + f) - f + f^2/2) / f^3, -1/4 <= f <= 1/2; double: (2 atanh(s) - 2 s) / s^3 in s^2 <= 0.04
#   sin       (sin r - r) / r^3            in r^2, |r| <= pi/4
#   cos       (cos r - 1 + r^2/2) / r^4    in r^2, |r| <= pi/4
#   asin      (asin x - x) / x^3           in x^2, |x| <= 1/2
#   atan      (atan t - t) / t^3           in t^2, |t| <= tan(pi/8)
#   sinh      (sinh x - x) / x^3           in x^2, |x| <= 1
#   erf       (erf x - x) / x              in x^2, |x| <= 1
#   erf_tail  -log(erfc x)                 for 1 <= x <= 4 (float) or 6 (double)
#   erfc      (1 + 2 x) e^(x^2) erfc(x)    in (x - k) / (x + k), k = 2 (float) or 3 (double), 0 <= x <= 10 or 27
#   lgamma    lgamma(2 + f) / f            for |f| <= 1/2
_COEFFICIENTS = """
exp float 0.99999946 0.49999133 0.16668224 0.0418997 0.008257751
exp double 1.0 0.5000000000000011 0.16666666666666435 0.04166666666652679 0.008333333333480623 0.0013888888944433425
  0.00019841269534572127 2.4801492314333928e-05 2.7557562563316546e-06 2.763051816710243e-07 2.500733423977786e-08
expm1 float 0.49999997 0.16666545 0.041667484 0.008366407 0.0013865841
expm1 double 0.5 0.16666666666666677 0.041666666666666644 0.008333333333321489 0.0013888888888903856
  0.00019841269886407 2.4801587276185898e-05 2.7557243963884346e-06 2.7557321281162636e-07 2.5109116814717523e-08
  2.0898806869879e-09
log float 0.3333345 -0.250001 0.19990812 -0.16647136 0.14478756 -0.13162807 0.10463713 -0.04506394
log double 0.6666666666666666 0.3999999999999972 0.2857142857157989 0.22222222190797156 0.18181821566124626
  0.15384404656486547 0.13341200579238174 0.11591523078333685 0.12576543236367843
sin float -0.16666655 0.008332184 -0.00019517023
sin double -0.1666666666666663 0.008333333333321789 -0.00019841269829284428 2.7557313503463816e-06
  -2.505072764742007e-08 1.589497896705271e-10
cos float 0.041666646 -0.0013887306 2.443165e-05
cos double 0.041666666666666595 -0.0013888888888873296 2.4801587288939666e-05 -2.755731418889638e-07
  2.0875700226292558e-09 -1.1358414979845938e-11
asin float 0.16666754 0.07495251 0.045476172 0.024151282 0.042213332
asin double 0.16666666666666763 0.0749999999997016 0.044642857175216925 0.03038194267877727 0.022372215806062263
  0.017351597287208396 0.013980997347410597 0.011397463917099874 0.010788378548952557 0.0036756881960349807
  0.021782258761297787 -0.021105029597322307 0.03269495779324219
atan float -0.33333316 0.19998533 -0.14244513 0.106002 -0.06092828
atan double -0.333333333333332 0.19999999999953863 -0.14285714280227751 0.1111111078514168 -0.09090897808735125
  0.07692061158396951 -0.066631150886548 0.05847971370162716 -0.05039680464803815 0.038074225827239044
  -0.017917895525923332
sinh float 0.16666667 0.008333311 0.00019842632 2.783945e-06
sinh double 0.16666666666666666 0.00833333333333357 0.0001984126984106653 2.755731930711661e-06 2.5052090200474356e-08
  1.6061231081033583e-10 7.51068049651551e-13 6.27414447889025e-15
erf float 0.12837912 -0.37612322 0.11280152 -0.026710631 0.0049168575 -0.0005628893
erf double 0.1283791670955126 -0.37612638903184087 0.11283791670970326 -0.02686617064785874 0.005223977650851236
  -0.0008548328424513748 0.00012055382037680677 -1.4926781053077363e-05 1.647946027483309e-06 -1.6540475759471569e-07
  1.5904013864954284e-08 -1.6055796927218674e-09 1.3677098034138352e-10
erf_tail float 0.0003415113 1.1270893 0.6381446 0.103107095 -0.021838326 0.0029477538 -0.0001863921
erf_tail double 5.027016022779069e-07 1.1283740908723758 0.6366436219771363 0.10270345601039715 -0.018990209575478423
  -0.00041058602439086715 0.0019159001250945557 -0.0007706087515193363 0.00013502887000995108 2.027722479453983e-05
  -2.2826594495345487e-05 8.668406737079266e-06 -2.1359694742172444e-06 3.733548392178363e-07 -4.6429646759289644e-08
  3.934866776132438e-09 -2.0452992483934195e-10 4.929490271981117e-12
erfc float 1.2769784 -0.092763826 -0.16602989 0.1640513 -0.05422528 -0.008034396 0.00874044 0.0012710579 -0.0014749415
  -0.0004381558 0.00020166031 0.000104400766
erfc double 1.2530080582697296 -0.13562110612458125 -0.04756229435344401 0.12964515870274973 -0.1192736634155307
  0.06830802734483789 -0.02377051491528356 0.002529391797663368 0.0018886903285076496 -0.0007798320843422813
  -0.00010515960525351093 0.00012509826257575105 4.948588216763671e-06 -2.009667678236256e-05 -7.285660490375593e-07
  3.4635978561091445e-06 3.5021166057187297e-07 -6.040159847646363e-07 -1.318232925621506e-07 9.089391788113796e-08
  3.2929135950187965e-08 -8.141657515383445e-09 -4.092144640014265e-09
lgamma double 0.42278433509846713 0.32246703342411326 -0.06735230105319567 0.020580808427772074 -0.007385551028926342
  0.002890510331587359 -0.0011927539013490587 0.0005096695003283561 -0.00022315497161978144 9.945788436050217e-05
  -4.492377864605188e-05 2.0503946660977886e-05 -9.45604438792016e-06 4.391941003408001e-06 -1.974914605575033e-06
  9.032455220431554e-07 -5.805226203750494e-07 2.94755574314847e-07
"""

TABLE: dict[tuple[str, str], list[float]] = {}
for _line in _COEFFICIENTS.replace("\n  ", " ").strip().splitlines():
    _name, _elem, *_values = _line.split()
    TABLE[_name, _elem] = [float(v) for v in _values]

LN2 = (0.6931471805598903, 5.497923018708371e-14)  # log(2) in two parts; n times the first is exact for |n| < 2^11
_LN2_FLOAT = (0.693145751953125, 1.4286068203094173e-06)  # the same for float, |n| < 2^9
_HALF_PI = (
    1.5707963267948966,
    6.123233995736765e-17,
    1.0828566739219139e-32,
)  # pi / 2 in three parts, all rounded down: sin(-0) = -0
_HALF_PI_FLOAT = (1.570796251296997, 7.549789415861596e-08, 5.390302529957765e-15)


def polynomial(b: Builder, name: str, t: str) -> str:
    """The polynomial of the table at t."""
    return horner(b, TABLE[name, b.elem], t)


def horner(b: Builder, coefficients: list[float], t: str) -> str:
    """Horner's rule: the fewest instructions (Estrin's was measured 5 % slower: loops hide the latency)."""
    p = b.const(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        p = b.fma(p, t, b.const(c))
    return p


def _clamp(b: Builder, x: str, low: float, high: float) -> str:
    """min(max(x, low), high), nan where x is nan: two instructions on x86."""
    lo, hi = b.const(low), b.const(high)
    x = b.select(b.fcmp("ogt", lo, x), lo, x)
    return b.select(b.fcmp("olt", hi, x), hi, x)


def flag(b: Builder, m: str) -> str:
    """1 where the mask holds, else 0."""
    return b.select(m, b.const(1), b.const(0))


def product(b: Builder, x: str, y: str) -> tuple[str, str]:
    """(p, e) with p + e = x y exactly (Dekker's splitting where there is no fused multiply-add)."""
    p = b.fmul(x, y)
    if b.has_fma:
        return p, b.fma(x, y, b.fneg(p))
    x1, x2 = _halves(b, x)
    y1, y2 = _halves(b, y)
    e = b.fadd(b.fsub(b.fmul(x1, y1), p), b.fmul(x1, y2))
    return p, b.fadd(b.fadd(e, b.fmul(x2, y1)), b.fmul(x2, y2))


def _halves(b: Builder, x: str) -> tuple[str, str]:
    t = b.fmul(x, b.const(2.0 ** ((b.mantissa + 2) // 2) + 1))
    high = b.fsub(t, b.fsub(t, x))
    return high, b.fsub(x, high)


def minus_product(b: Builder, z: str, x: str, y: str) -> str:
    """The value z - x y rounded once, for z close to x y."""
    if b.has_fma:
        return b.fma(b.fneg(x), y, z)
    p, e = product(b, x, y)
    return b.fsub(b.fsub(z, p), e)


# Exponentials -------------------------------------------------------------------------------------------------------


def _reduce_exp(b: Builder, x: str, offset: float) -> tuple[str, str, str]:
    """(n, k, r) with x = n log 2 + r; the low bits of k hold n + offset. Needs |n| < 2^(mantissa - 2)."""
    magic = b.const(1.5 * 2.0**b.mantissa + offset)
    k = b.fma(x, b.const(1 / math.log(2)), magic)
    n = b.fsub(k, magic)
    return n, k, _subtract_log2(b, x, n)


def _subtract_log2(b: Builder, x: str, n: str) -> str:
    high, low = LN2 if b.double else _LN2_FLOAT
    return b.fma(n, b.const(-low), b.fma(n, b.const(-high), x))


def exp(b: Builder, x: str, shift: int = 0, tail: str | None = None) -> str:
    """The value 2^shift e^(x + tail), with gradual underflow."""
    if b.wide:  # scalef over- and underflows by itself, also for n = +-inf; `range` keeps r finite where |x| is huge
        n = b.rint(b.fmul(x, b.const(1 / math.log(2))))
        k, r = "", _subtract_log2(b, x, n)
    else:
        x = _clamp(b, x, *((-746.0, 710.5) if b.double else (-104.0, 89.5)))
        n, k, r = _reduce_exp(b, x, 2 * b.bias + shift)
    if tail is not None:
        r = b.fadd(r, tail)
    if b.wide:
        r = b.native("range", r, b.const(0.5), imm=2)  # the smaller magnitude with the sign of r; 0.5 where r is nan
    if b.has_fma and tail is None:
        p = b.fma(polynomial(b, "exp", r), r, b.const(1))
    else:  # one instruction more, for products that are rounded and callers that need the last bit
        p = b.fadd(b.fma(polynomial(b, "expm1", r), b.fmul(r, r), r), b.const(1))
    return scale(b, p, b.fadd(n, b.const(shift)) if b.wide and shift else n, k)


def scale(b: Builder, p: str, n: str, k: str) -> str:
    """The value p 2^n; k holds n + 2 bias in its low bits. Without AVX-512 the power is made of two exact factors."""
    if b.wide:
        return b.native("scalef", p, n)
    bits = b.bitcast_int(k)
    half = b.lshr(bits, b.iconst(1))
    s1, s2 = (b.bitcast_float(b.shl(i, b.iconst(b.mantissa))) for i in (half, b.isub(bits, half)))
    return b.fmul(b.fmul(p, s1), s2)


def exp2(b: Builder, x: str) -> str:
    """2^x = exp(f log 2) 2^n with n the nearest integer."""
    x = _clamp(b, x, *((-1080.0, 1030.0) if b.double else (-160.0, 130.0)))
    n = b.rint(x)
    r = b.fmul(b.fsub(x, n), b.const(math.log(2)))
    p = b.fadd(b.fma(polynomial(b, "expm1", r), b.fmul(r, r), r), b.const(1))
    return scale(b, p, n, b.fadd(n, b.const(1.5 * 2.0**b.mantissa + 2 * b.bias)))


def _expm1_reduced(b: Builder, x: str) -> str:
    """e^x - 1 for x in [-60, 710] or nan: 2^n (e^r - 1) + (2^n - 1), at half size against early overflow."""
    _, k, r = _reduce_exp(b, x, b.bias - 1)
    q = b.fma(polynomial(b, "expm1", r), b.fmul(r, r), r)
    s = b.bitcast_float(b.shl(b.bitcast_int(k), b.iconst(b.mantissa)))
    half = b.fma(s, q, b.fsub(s, b.const(0.5)))
    return b.fadd(half, half)


def expm1(b: Builder, x: str) -> str:
    """The value e^x - 1."""
    high = 710.0 if b.double else 89.0
    return b.copysign(_expm1_reduced(b, _clamp(b, x, -60.0, high)), x)


def sigmoid(b: Builder, x: str) -> str:
    """1 / (1 + e^-x)."""
    return b.fdiv(b.const(1), b.fadd(b.const(1), exp(b, b.fneg(x))))


def sinh(b: Builder, x: str) -> str:
    """By e^a / 2 - e^-a / 2 from a = |x| = 1 on."""
    a = b.abs(x)
    half = exp(b, a, shift=-1)
    large = b.fsub(half, b.fdiv(b.const(0.25), half))
    z = b.fmul(a, a)
    small = b.fma(b.fmul(a, z), polynomial(b, "sinh", z), a)
    return b.copysign(b.select(b.fcmp("olt", a, b.const(1)), small, large), x)


def cosh(b: Builder, x: str) -> str:
    """(e^x + e^-x) / 2."""
    half = exp(b, b.abs(x), shift=-1)
    return b.fadd(half, b.fdiv(b.const(0.25), half))


def tanh(b: Builder, x: str) -> str:
    """By tanh |x| = t / (t + 2), t = e^(2|x|) - 1; one from |x| = 20 on."""
    a = b.abs(x)
    a = b.select(b.fcmp("ogt", a, b.const(20)), b.const(20), a)
    t = _expm1_reduced(b, b.fadd(a, a))
    return b.copysign(b.fdiv(t, b.fadd(t, b.const(2))), x)


# Logarithms ---------------------------------------------------------------------------------------------------------


def split_log(b: Builder, x: str) -> tuple[str, str]:
    """(e, f) with x = 2^e (1 + f), -1/4 <= f < 1/2, for x > 0; with AVX-512 log(0), log(inf) and nan come out of it."""
    one = b.const(1)
    if b.wide:
        m = b.native("getmant", x, imm=0b1011)  # in [3/4, 3/2), nan for x < 0
        return b.fsub(b.native("getexp", x), b.native("getexp", m)), b.fsub(m, one)
    shift = 2 * b.mantissa
    tiny = b.fcmp("olt", x, b.const(2.0 ** (1 - b.bias)))
    bits = b.bitcast_int(b.select(tiny, b.fmul(x, b.const(2.0**shift)), x))
    width = b.iconst(b.mantissa)
    e = b.lshr(b.iadd(bits, b.iconst(1 << (b.mantissa - 1))), width)  # biased; one more from m = 3/2 on
    m = b.bitcast_float(b.isub(bits, b.shl(b.isub(e, b.iconst(b.bias)), width)))
    magic = 2.0**b.mantissa  # its low bits take an integer
    e = b.bitcast_float(b.ior(e, b.iconst((b.bias + b.mantissa) << b.mantissa)))
    e = b.fsub(e, b.select(tiny, b.const(magic + b.bias + shift), b.const(magic + b.bias)))
    return e, b.fsub(m, one)


def special_log(b: Builder, x: str, y: str) -> str:
    """The logarithm y of x, corrected for x = 0, x < 0, inf and nan."""
    if b.wide:
        return y
    negative = b.select(b.fcmp("olt", x, b.const(0)), b.const(math.nan), x)
    special = b.select(b.fcmp("oeq", x, b.const(0)), b.const(-math.inf), negative)
    top = (2 * b.bias + 1) << b.mantissa  # the bits of inf
    return b.select(b.icmp("ult", b.isub(b.bitcast_int(x), b.iconst(1)), b.iconst(top - 1)), y, special)


def _log1p_tail(b: Builder, f: str) -> str:
    """log(1 + f) - f for -1/4 <= f <= 1/2."""
    if not b.double:
        z = b.fmul(f, f)
        return b.fmul(z, b.fma(polynomial(b, "log", f), f, b.const(-0.5)))
    s = b.fdiv(f, b.fadd(f, b.const(2)))  # log(1 + f) = 2 atanh s = f - s (f - s^2 R)
    z = b.fmul(s, s)
    return b.fmul(s, b.fsub(b.fmul(z, polynomial(b, "log", z)), f))


def log(b: Builder, x: str) -> str:
    """The natural logarithm, as e log 2 + tail."""
    e, f = split_log(b, x)
    high, low = LN2 if b.double else _LN2_FLOAT
    tail = b.fma(e, b.const(low), _log1p_tail(b, f))
    return special_log(b, x, b.fma(e, b.const(high), b.fadd(f, tail)))


def log2(b: Builder, x: str) -> str:
    """The logarithm to base 2: e + log(1 + f) / log 2."""
    e, f = split_log(b, x)
    factor = 1 / math.log(2)
    return special_log(b, x, b.fma(b.fadd(f, _log1p_tail(b, f)), b.const(factor), e))


def log1p(b: Builder, x: str) -> str:
    """log(u) + c / u with u + c = 1 + x exactly."""
    one = b.const(1)
    u = b.fadd(x, one)
    v = b.fsub(u, one)
    c = b.fadd(b.fsub(one, b.fsub(u, v)), b.fsub(x, v))
    c = b.fdiv(c, u)
    c = b.select(b.fcmp("ord", c, c), c, b.const(0))  # u = 0 or inf
    return b.copysign(b.fadd(log(b, u), c), x)


def relu(b: Builder, x: str) -> str:
    """max(x, 0)."""
    return b.select(b.fcmp("olt", x, b.const(0)), b.const(0), x)


def softplus(b: Builder, x: str) -> str:
    """By max(x, 0) + log(1 + e^-|x|)."""
    return b.fadd(relu(b, x), log1p(b, exp(b, b.fneg(b.abs(x)))))


def asinh(b: Builder, x: str) -> str:
    """log1p(a + a^2 / (1 + sqrt(1 + a^2))), a = |x|, and log(a) + log(2) where a^2 may overflow."""
    a, one = b.abs(x), b.const(1)
    big = b.fcmp("ogt", a, b.const(2.0**60))
    z = b.fmul(a, a)
    u = b.fadd(a, b.fdiv(z, b.fadd(one, b.sqrt(b.fadd(one, z)))))
    y = log1p(b, b.select(big, a, u))
    return b.copysign(b.select(big, b.fadd(y, b.const(math.log(2))), y), x)


def xlogx(b: Builder, x: str) -> str:
    """The value x log x, 0 at 0."""
    return b.select(b.fcmp("oeq", x, b.const(0)), b.const(0), b.fmul(x, log(b, x)))


# Trigonometric ------------------------------------------------------------------------------------------------------


def _reduce_half_pi(b: Builder, x: str) -> tuple[str, str]:
    """(q, r) with x = n pi/2 + r, |r| <= pi/4 and q = n mod 4 in the low bits of an integer.

    x - n pi/2 in three exact steps; in float a second round repairs n where |x| > 10^6. Good to |x| = 1e8 (float) and
    1e15 (double); beyond that r means nothing and is clamped, so that sines stay in [-1, 1].
    """
    magic, factor = b.const(1.5 * 2.0**b.mantissa), b.const(2 / math.pi)
    parts = _HALF_PI if b.double else _HALF_PI_FLOAT
    if b.double:
        k = b.fma(x, factor, magic)
        n = b.fsub(k, magic)
    else:  # `magic` would be too small for n; and not `rint`, whose -0 would lose the sign of x = -0
        n = b.floor(b.fma(x, factor, b.const(0.5)))
    r = x
    for part in parts:
        r = minus_product(b, r, n, b.const(part))
    if not b.double:
        k = b.fma(r, factor, magic)
        n2 = b.fsub(k, magic)
        for part in parts[:2]:
            r = minus_product(b, r, n2, b.const(part))
        k = b.fadd(k, b.fma(b.rint(b.fmul(n, b.const(0.25))), b.const(-4), n))
    return b.bitcast_int(k), _clamp(b, r, -1.0, 1.0)


def sin_cos_reduced(b: Builder, r: str) -> tuple[str, str]:
    """(sin r, cos r) for |r| <= pi/4."""
    z = b.fmul(r, r)
    s = b.copysign(b.fma(b.fmul(r, z), polynomial(b, "sin", z), r), r)
    c = b.fma(b.fmul(z, z), polynomial(b, "cos", z), b.fma(z, b.const(-0.5), b.const(1)))
    return s, c


def sine(b: Builder, x: str, quarter: int) -> str:
    """sin(x + quarter pi/2)."""
    q, r = _reduce_half_pi(b, x)
    if quarter:
        q = b.iadd(q, b.iconst(quarter))
    s, c = sin_cos_reduced(b, r)
    odd = b.icmp("ne", b.iand(q, b.iconst(1)), b.iconst(0))
    sign = b.shl(b.iand(q, b.iconst(2)), b.iconst(b.bits - 2))
    return b.bitcast_float(b.ixor(b.bitcast_int(b.select(odd, c, s)), sign))


def tan(b: Builder, x: str) -> str:
    """The tangent."""
    q, r = _reduce_half_pi(b, x)
    s, c = sin_cos_reduced(b, r)
    odd = b.icmp("ne", b.iand(q, b.iconst(1)), b.iconst(0))
    return b.fdiv(b.select(odd, b.fneg(c), s), b.select(odd, s, c))


def sinc(b: Builder, x: str) -> str:
    """The value sin(x) / x, 1 at 0."""
    return b.select(b.fcmp("oeq", x, b.const(0)), b.const(1), b.fdiv(sine(b, x, 0), x))


def _asin_reduced(b: Builder, x: str) -> tuple[str, str]:
    """(small, p): p = asin |x| where |x| <= 1/2, else p = asin sqrt((1 - |x|) / 2) = acos(|x|) / 2."""
    a = b.abs(x)
    small = b.fcmp("ole", a, b.const(0.5))
    z = b.select(small, b.fmul(a, a), b.fmul(b.fsub(b.const(1), a), b.const(0.5)))
    s = b.select(small, a, b.sqrt(z))
    return small, b.fma(b.fmul(s, z), polynomial(b, "asin", z), s)


def _half_pi(b: Builder) -> tuple[str, str]:
    high, low, _ = _HALF_PI if b.double else _HALF_PI_FLOAT
    return b.const(high), b.const(low)


def asin(b: Builder, x: str) -> str:
    """The inverse sine: pi/2 - acos |x| for |x| > 1/2."""
    small, p = _asin_reduced(b, x)
    high, low = _half_pi(b)
    return b.copysign(b.select(small, p, b.fadd(b.fma(b.const(-2), p, high), low)), x)


def acos(b: Builder, x: str) -> str:
    """The inverse cosine."""
    small, p = _asin_reduced(b, x)
    high, low = _half_pi(b)
    twice = b.fadd(p, p)
    outer = b.select(b.fcmp("olt", x, b.const(0)), b.fadd(b.fsub(b.fadd(high, high), twice), b.fadd(low, low)), twice)
    return b.select(small, b.fadd(b.fsub(high, b.copysign(p, x)), low), outer)


def _atan_positive(b: Builder, a: str) -> str:
    """atan(a) for a >= 0, reduced to |t| <= tan(pi/8) by one division."""
    one, zero = b.const(1), b.const(0)
    middle, large = (
        b.fcmp("ogt", a, b.const(math.tan(math.pi / 8))),
        b.fcmp("ogt", a, b.const(math.tan(3 * math.pi / 8))),
    )
    numerator = b.select(large, b.const(-1), b.select(middle, b.fsub(a, one), a))
    denominator = b.select(large, a, b.select(middle, b.fadd(a, one), one))
    t = b.fdiv(numerator, denominator)
    high, low, _ = _HALF_PI if b.double else _HALF_PI_FLOAT
    z = b.fmul(t, t)
    base = b.select(large, b.const(high), b.select(middle, b.const(high / 2), zero))
    rest = b.select(large, b.const(low), b.select(middle, b.const(low / 2), zero))
    return b.fadd(base, b.fadd(t, b.fma(b.fmul(t, z), polynomial(b, "atan", z), rest)))


def atan(b: Builder, x: str) -> str:
    """The inverse tangent."""
    return b.copysign(_atan_positive(b, b.abs(x)), x)


def atan2(b: Builder, y: str, x: str) -> str:
    """The angle of (x, y), by atan of the smaller over the larger magnitude."""
    ax, ay = b.abs(x), b.abs(y)
    steep = b.fcmp("ogt", ay, ax)
    small, large = b.select(steep, ax, ay), b.select(steep, ay, ax)
    q = b.fdiv(small, large)
    q = b.select(b.fcmp("oeq", small, large), b.select(b.fcmp("oeq", large, b.const(0)), large, b.const(1)), q)
    r = _atan_positive(b, q)
    high, low = _half_pi(b)
    r = b.select(steep, b.fadd(b.fsub(high, r), low), r)
    left = b.icmp("slt", b.bitcast_int(x), b.iconst(0))  # the sign bit: atan2(0, -0) = pi
    r = b.select(left, b.fadd(b.fsub(b.fadd(high, high), r), b.fadd(low, low)), r)
    nan = b.fcmp("uno", x, y)
    return b.copysign(b.select(nan, b.const(math.nan), r), y)

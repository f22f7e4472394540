"""The formula language: what text means, which functions there are, and where errors point."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.core.errors import ArgumentError, ShapeError
from pullback.kernels.codegen.eager import evaluate
from pullback.kernels.formula import declare, parse, signature
from pullback.kernels.ir import grad
from pullback.kernels.ir.expr import const, index, variable, variables
from pullback.kernels.ir.macros import FUNCTIONS
from pullback.kernels.ir.primitives import PRIMITIVES, op
from pullback.kernels.ir.structure import STRUCTURES

ALIASES = ["x = Vi(3)", "y = Vj(3)", "s = Pm(1)", "a = Vi(9)", "z = Vj(6)", "u = Vi(2)"]
DIMS = {"x": 3, "y": 3, "s": 1, "a": 9, "z": 6, "u": 2}
X, Y, S = (parse(n, ALIASES) for n in "xys")


def tensors():
    return [0.4 + torch.rand(5, d, dtype=torch.float64) for d in DIMS.values()]


def value(e, arguments):
    (y,) = evaluate([e], arguments)
    return y.expand(arguments[0].shape[0], e.dim)


# What text means --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("x + y * x", "x + (y * x)"),
        ("x - y - x", "(x - y) - x"),
        ("x / y / x", "(x / y) / x"),
        ("-x ** 2", "-(x ** 2)"),
        ("x ** -2", "Pow(x, -2)"),
        ("x ** -s", "Powf(x, -s)"),
        ("s ** x ** y", "s ** (x ** y)"),
        ("-x * y", "(-x) * y"),
        ("x | y + x", "x | (y + x)"),  # as in Python, where | binds weaker than +
        ("x | y * 2", "Scalprod(x, y * 2)"),
        ("(x | y) < s", "LessThan(Scalprod(x, y), s)"),
        ("x | y < s", "LessThan(Scalprod(x, y), s)"),
        ("s * x | y", "Scalprod(s * x, y)"),
        ("x > y", "LessThan(y, x)"),
        ("x >= 1", "LessOrEqual(1, x)"),
        ("x <= y", "LessOrEqual(x, y)"),
        ("x == y", "Equal(x, y)"),
        ("x != y", "NotEqual(x, y)"),
        ("x ** 2", "Square(x)"),
        ("x ** 3", "Pow(x, 3)"),
        ("x ** 2.0", "Square(x)"),
        ("x ** 0.5", "Sqrt(x)"),
        ("x ** -0.5", "Rsqrt(x)"),
        ("x ** 1.5", "Powf(x, 1.5)"),
        ("x ** IntCst(3)", "Pow(x, 3)"),
        ("2 ** s", "Powf(2, s)"),
        ("1 / 2 * x", "0.5 * x"),
        ("2 ** 3 - 1 + x", "7 + x"),
        ("+x", "x"),
        ("--x", "Minus(Minus(x))"),
        ("(x, y)", "Scalprod(x, y)"),
        ("[x, 1, y]", "Concat(x, 1, y)"),
        ("[1, 2, 3] * x", "Const(1, 2, 3) * x"),
        ("[x, [1, 2]]", "Concat(x, Const(1, 2))"),
        (".5e1 * x + 1.", "5 * x + 1"),
        ("Const(inf, -inf, -1.5e-300)", "Const(inf, -inf, -1.5e-300)"),
        ("IntCst(3) * RatCst(3, 4) * IntInv(2)", "Const(3) * Const(0.75) * Const(0.5)"),
        ("Zero(3) + x", "Const(0, 0, 0) + x"),
        ("Var(0, 3, 0) + Var(1,3,1)", "x + y"),
        ("TensorDot(x, y, Ind(3), Ind(3), Ind(0), Ind(0))", "TensorDot(x, y, [3], [3], [0], [0], [])"),
        ("Factorize(Exp(x), x) + AutoFactorize(y)", "Exp(x) + y"),
        ("Extract(z, 1, 3)", "Gather(z, [1, 2, 3])"),
        ("\tExp (\n x )  ", "Exp(x)"),
    ],
)
def test_meaning(text, means):
    assert parse(text, ALIASES) is parse(means, ALIASES)


def test_variables_shadow_functions_only_without_parentheses():
    assert parse("Exp(Exp)", ["Exp = Vi(2)"]) is op("Exp", variable(0, 2, 0))


def test_index_variables():
    assert parse("Index(0) < Index(1)") is op("LessThan", index(0), index(1))


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_constants_read_back(numbers):
    e = const(*numbers)
    again = parse(str(e))
    assert again.params == e.params


@given(st.text(alphabet="xys 0123456789.+-*/|()[],<>=!eSinExpElm&\n", max_size=25))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_text_gives_an_expression_or_an_error_with_its_place(text):
    try:
        parse(text, ALIASES[:3])
    except (ArgumentError, ShapeError) as error:
        assert "at position" in str(error)
        assert "^" in str(error).splitlines()[2]


def test_deep_nesting():
    assert parse("-" * 50 + "(" * 50 + "x" + ")" * 50, ALIASES).dim == 3
    with pytest.raises(ArgumentError, match="nested too deeply"):
        parse("(" * 5000 + "x" + ")" * 5000, ALIASES)


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        (
            "x * Sqare(y)",
            ArgumentError,
            """unknown function Sqare at position 4 of the formula
  x * Sqare(y)
      ^
did you mean Square?""",
        ),
        (
            "exp(x)",
            ArgumentError,
            """unknown function exp at position 0 of the formula
  exp(x)
  ^
did you mean Exp?""",
        ),
        (
            "x + w",
            ArgumentError,
            """unknown name w at position 4 of the formula
  x + w
      ^
declared are x, y, s, a, z, u""",
        ),
        (
            "x(3)",
            ArgumentError,
            """unknown function x at position 0 of the formula
  x(3)
  ^
x is a variable; write x * (...) for a product""",
        ),
        (
            "x * (y + s",
            ArgumentError,
            """expected ')' to close '(' of position 4, found the end of the formula at position 10 of the formula
  x * (y + s
            ^""",
        ),
        (
            "x + y) * s",
            ArgumentError,
            """unexpected ')' at position 5 of the formula
  x + y) * s
       ^""",
        ),
        (
            "x y",
            ArgumentError,
            """unexpected 'y' at position 2 of the formula
  x y
    ^""",
        ),
        (
            "x + ",
            ArgumentError,
            """expected an expression, found the end of the formula at position 3 of the formula
  x +\x20
     ^""",
        ),
        (
            "x @ y",
            ArgumentError,
            """cannot read '@' at position 2 of the formula
  x @ y
    ^""",
        ),
        (
            "Exp(x + z)",
            ShapeError,
            None,
        ),
        (
            "1 + Elem(x, 3)",
            ShapeError,
            """component 3 of a vector of dimension 3 at position 4 of the formula
  1 + Elem(x, 3)
      ^""",
        ),
        (
            "SqDist(x)",
            ArgumentError,
            """SqDist(f, g) expects 2 arguments; got 1 at position 0 of the formula
  SqDist(x)
  ^""",
        ),
        (
            "2 * Sin(x, y)",
            ArgumentError,
            """Sin expects 1 operand; got 2 arguments at position 4 of the formula
  2 * Sin(x, y)
      ^""",
        ),
        (
            "x < y < s",
            ArgumentError,
            """comparisons cannot be chained at position 6 of the formula
  x < y < s
        ^
use LogicalAnd(a < b, b < c)""",
        ),
        (
            "Exp * x",
            ArgumentError,
            """Exp is a function and needs its arguments in parentheses at position 0 of the formula
  Exp * x
  ^""",
        ),
        (
            "x * (1 / 0)",
            ArgumentError,
            """division by zero at position 7 of the formula
  x * (1 / 0)
         ^""",
        ),
        (
            "(x, y, s)",
            ArgumentError,
            """parentheses hold one expression, or two at position 0 of the formula
  (x, y, s)
  ^
write [f, g, h] to concatenate""",
        ),
        ("Extract(x, 1, 3)", ShapeError, None),
        ("Extract(x, 0, 0)", ShapeError, None),
        ("ElemT(x, 3, 0)", ShapeError, None),
        ("ElemT(s, 3, 3)", ShapeError, None),
        ("OneHot(x, 3)", ShapeError, None),
        ("OneHot(s, 0)", ArgumentError, None),
        ("Zero(0)", ArgumentError, None),
        ("Var(0, 3, 5)", ArgumentError, None),
        ("Var(-1, 3, 0)", ArgumentError, None),
        ("Index(2)", ArgumentError, None),
        ("Pow(x, y)", ArgumentError, None),
        ("BSpline(x, s, 2)", ShapeError, None),
        ("BSpline(x, y, 1)", ShapeError, None),
        ("SoftDTW_SqDist(x, y, x)", ShapeError, None),
        ("SymSqNorm(z, x)", ShapeError, None),
        ("WeightedSqNorm(z, x)", ShapeError, None),
        ("MatVecMult(a, u)", ShapeError, None),
        ("VecMatMult(u, a)", ShapeError, None),
        ("Kron(x, y, [3], [1, 3])", ArgumentError, None),
        ("ComplexMult(z, [z, u])", ShapeError, None),
        ("ComplexReal(x)", ShapeError, None),
        ("ComplexScal(z, z)", ShapeError, None),
        ("ComplexSumT(u, 5)", ShapeError, None),
        ("ComplexRealScal(u, u)", ShapeError, None),
        ("Grad(x, x)", ShapeError, None),
        ("Grad(x, x, u)", ShapeError, None),
        ("Diff(x, x, u)", ShapeError, None),
        ("Divergence(x | x, x)", ShapeError, None),
        ("Laplacian(x, x)", ShapeError, None),
        ("TraceOperator(u * Elem(x, 0), x)", ShapeError, None),
        ("AdjointOperator(x * x, x, x)", ArgumentError, None),
        ("Matern32(x)", ShapeError, None),
        ("Ind(x)", ArgumentError, None),
        ("[]", ArgumentError, None),
        ("", ArgumentError, None),
    ],
)
def test_error(text, kind, expected):
    with pytest.raises(kind) as caught:
        parse(text, ALIASES)
    if expected is not None:
        assert str(caught.value) == expected
    assert "at position" in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_error_in_a_long_formula_shows_its_surroundings():
    with pytest.raises(ArgumentError) as caught:
        parse("x * " * 20 + "no" + " * x" * 20, ALIASES)
    lines = str(caught.value).splitlines()
    assert lines[0] == "unknown name no at position 80 of the formula"
    assert lines[1].startswith("  ... * x *") and lines[1].endswith("* x ...") and len(lines[1]) < 115
    assert lines[1][lines[2].index("^") :].startswith("no * x")


# Declarations -----------------------------------------------------------------------------------------------------


def test_declarations():
    assert declare(["x = Vi(3)", "y=Vj(5 , 2)", " Pm(1) ", "Var(7,4,1)"]) == [
        ("x", variable(0, 3, 0)),
        ("y", variable(5, 2, 1)),
        ("", variable(2, 1, 2)),
        ("", variable(7, 4, 1)),
    ]
    e = parse("Var(2,1,2) * x", ["x = Vi(3)", "y = Vj(2)"])
    names, sizes = signature(declare(["x = Vi(3)", "y = Vj(2)"]), e)
    assert names == ("x", "y", "argument 2")
    assert sizes == ((3, 0), (2, 1), (1, 2))
    assert signature(declare(["x = Vi(1, 3)", "y = Vj(0, 2)"])) == (("y", "x"), ((2, 1), (3, 0)))


@pytest.mark.parametrize(
    ("aliases", "text"),
    [
        (["x = Vk(3)"], r"expected Vi, Vj or Pm, found 'Vk' at position 4 of the alias 'x = Vk\(3\)'"),
        (["x = Vx(3)"], "Vx is an old spelling at position 4 .*\n.*\n.*\nwrite Vi"),
        (["x = Vy(3)"], "Vy is an old spelling at position 4 .*\n.*\n.*\nwrite Vj"),
        (["x = Vi(3"], r"expected '\)' after the arguments of Vi, found the end of the alias"),
        (["x = Vi()"], r"expected an integer, found '\)'"),
        (["x = Vi(d)"], "expected an integer, found 'd'"),
        (["x = Vi(0)"], "the dimension must be at least 1"),
        (["x = Vi(1,2,3)"], "Vi expects a dimension, or a position and a dimension"),
        (["x = Var(1,2)"], "Var expects a position, a dimension and a category"),
        (["x = Vi(3) + 1"], r"unexpected '\+'"),
        (["x = "], "expected Vi, Vj or Pm, found ''"),
        (["x = Vi(3)", "x = Vj(3)"], "the aliases declare x twice"),
        ("x = Vi(3)", "aliases must be a list of strings"),
        ([3], "alias 3 must be a string; got int"),
    ],
)
def test_bad_declaration(aliases, text):
    with pytest.raises(ArgumentError, match=text):
        declare(aliases)


def test_bad_signature():
    with pytest.raises(
        ShapeError, match="argument 0 is declared as x of category Vi and dimension 3 and as Var of cat"
    ):
        signature(declare(["x = Vi(3)"]), parse("Var(0,2,1)"))
    with pytest.raises(ArgumentError, match=r"nothing declares argument 1; declared are the positions \[0, 2\]"):
        signature(declare(["x = Vi(3)"]), parse("Var(2,2,1)"))
    with pytest.raises(ArgumentError, match="formula must be a string; got int"):
        parse(3)


# Functions --------------------------------------------------------------------------------------------------------

# Every function of the reference, in its order; the second list is what users of KeOps miss there.
KEOPS = """
Minus Inv Square Exp Log Cos Sin Acos Asin Atan Abs Sqrt Rsqrt XLogX SinXDivX Pow Sign Step ReLU Floor Round
ClampInt DiffClampInt Add Subtract Mult Divide Powf Atan2 Equal NotEqual LessThan LessOrEqual Clamp IfElse Mod
Scalprod Sum SumT SqNorm2 Norm2 Normalize SqDist SqNormIso SqNormDiag SymSqNorm WeightedSqNorm WeightedSqDist
Max Min ArgMax ArgMin Elem ElemT Extract ExtractT Concat OneHot BSpline SoftDTW_SqDist IntCst RatCst IntInv
Zero Var MatVecMult VecMatMult TensorProd TensorDot Kron ComplexReal ComplexImag Real2Complex Imag2Complex
Conj ComplexAbs ComplexSquareAbs ComplexAngle ComplexSum ComplexSumT ComplexAdd ComplexSubtract ComplexMult
ComplexRealScal ComplexDivide ComplexExp ComplexExp1j ComplexScal Grad Diff GradMatrix Divergence Laplacian
TraceOperator AdjointOperator SumLinOperator Factorize AutoFactorize
"""
MISSED = """
Tan Tanh Sinh Cosh Asinh Erf Erfc Sigmoid Softplus Log1p Expm1 Log2 Exp2 Ceil Trunc Floor Maximum Minimum
Where LogicalAnd LogicalOr LogicalNot Lgamma Digamma Matern12 Matern32 Matern52 Index Sinc LogAddExp Const
"""


def test_nothing_is_forgotten():
    assert not set(f"{KEOPS} {MISSED}".split()) - set(FUNCTIONS)
    helpers = {"Gather", "Scatter", "Trigamma", "PolyGamma", "SincDerivative", "Matern"}
    assert set(FUNCTIONS) - set(f"{KEOPS} {MISSED}".split()) == helpers
    assert set(PRIMITIVES) | set(STRUCTURES) <= set(FUNCTIONS)


def softdtw(x, y, gamma):
    """The recursion as it is defined."""
    n, m = x.shape[-1], y.shape[-1]
    r = {}
    for i in range(n):
        for j in range(m):
            before = [r[p] for p in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if p in r]
            soft = -gamma[:, 0] * torch.logsumexp(torch.stack([-b / gamma[:, 0] for b in before]), 0) if before else 0
            r[i, j] = (x[:, i] - y[:, j]) ** 2 + soft
    return r[n - 1, m - 1][:, None]


def bspline(knots, x, order):
    """The recursion as it is defined, one basis function at a time."""
    t = [knots[:, k] for k in range(knots.shape[-1])]

    def basis(i, k):
        if k == 0:
            return ((t[i] <= x[:, 0]) & (x[:, 0] < t[i + 1])).to(x.dtype)
        y = 0
        if (t[i + k] != t[i]).all():
            y = y + (x[:, 0] - t[i]) / (t[i + k] - t[i]) * basis(i, k - 1)
        if (t[i + k + 1] != t[i + 1]).all():
            y = y + (t[i + k + 1] - x[:, 0]) / (t[i + k + 1] - t[i + 1]) * basis(i + 1, k - 1)
        return y

    return torch.stack([basis(i, order) for i in range(len(t) - order - 1)], -1)


def cplx(t):
    return torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2).contiguous())


def real(t):
    return torch.view_as_real(t.resolve_conj()).flatten(-2)


def increasing(a):
    return a.cumsum(-1) / 5


def kron(a, b):
    return torch.einsum("rij,rkl->rikjl", a.reshape(-1, 2, 3), b.reshape(-1, 3, 3)).flatten(1)


def matern52(z):
    return (1 + z + z**2 / 3) * torch.exp(-z)


def norm2(v):
    return v.square().sum(-1, keepdim=True)


# name: (arguments, the same by torch)
DENSE = {
    "Scalprod": ("x, y", lambda x, y: (x * y).sum(-1, keepdim=True)),
    "SqNorm2": ("x", norm2),
    "Norm2": ("x", lambda x: x.norm(dim=-1, keepdim=True)),
    "Normalize": ("x", lambda x: x / x.norm(dim=-1, keepdim=True)),
    "SqDist": ("x, y", lambda x, y: norm2(x - y)),
    "SqNormIso": ("s, x", lambda s, x: s * norm2(x)),
    "SqNormDiag": ("x, y", lambda s, x: (s * x * x).sum(-1, keepdim=True)),
    "SymSqNorm": ("a, x", lambda a, x: torch.einsum("ri,rij,rj->r", x, a.reshape(-1, 3, 3), x)[:, None]),
    "WeightedSqNorm": ("a, x", lambda a, x: torch.einsum("ri,rij,rj->r", x, a.reshape(-1, 3, 3), x)[:, None]),
    "WeightedSqDist": ("s, x, y", lambda s, x, y: s * norm2(x - y)),
    "Elem": ("x, 1", lambda x: x[:, 1:2]),
    "ElemT": ("s, 3, 1", lambda s: torch.nn.functional.pad(s, (1, 1))),
    "Extract": ("z, 1, 3", lambda z: z[:, 1:4]),
    "ExtractT": ("x, 2, 6", lambda x: torch.nn.functional.pad(x, (2, 1))),
    "OneHot": ("3 * s, 4", lambda s: torch.eye(5, dtype=s.dtype)[(3 * s[:, 0] + 0.5).long(), :4]),
    "ClampInt": ("3 * x, 2, 3", lambda x: (3 * x).clamp(2, 3)),
    "DiffClampInt": ("3 * x, 2, 3", lambda x: ((3 * x >= 2) & (3 * x <= 3)).double()),
    "BSpline": ("KNOTS, s, 2", lambda a, s: bspline(increasing(a), s, 2)),
    "SoftDTW_SqDist": ("z, x, s", softdtw),
    "IntCst": ("3", lambda: torch.full((5, 1), 3.0, dtype=torch.float64)),
    "RatCst": ("3, 4", lambda: torch.full((5, 1), 0.75, dtype=torch.float64)),
    "IntInv": ("4", lambda: torch.full((5, 1), 0.25, dtype=torch.float64)),
    "Zero": ("2", lambda: torch.zeros(5, 2, dtype=torch.float64)),
    "Const": ("1, 2", lambda: torch.tensor([1.0, 2.0], dtype=torch.float64).expand(5, 2)),
    "MatVecMult": ("z, x", lambda z, x: torch.einsum("rij,rj->ri", z.reshape(-1, 2, 3), x)),
    "VecMatMult": ("u, z", lambda u, z: torch.einsum("ri,rij->rj", u, z.reshape(-1, 2, 3))),
    "TensorProd": ("x, u", lambda x, u: (x[:, :, None] * u[:, None]).flatten(1)),
    "Kron": ("z, a, [2, 3], [3, 3]", kron),
    "Factorize": ("Exp(x), x", torch.exp),
    "AutoFactorize": ("x", lambda x: x),
    "Matern12": ("x, y, s", lambda x, y, s: torch.exp(-(x - y).norm(dim=-1, keepdim=True) / s)),
    "Matern32": ("s", lambda s: (1 + 3**0.5 * s) * torch.exp(-(3**0.5) * s)),
    "Matern52": ("x, y", lambda x, y: matern52(5**0.5 * (x - y).norm(dim=-1, keepdim=True))),
    "Sinc": ("x", lambda x: torch.sinc(x)),
    "ComplexReal": ("z", lambda z: cplx(z).real),
    "ComplexImag": ("z", lambda z: cplx(z).imag),
    "Real2Complex": ("x", lambda x: real(x + 0j)),
    "Imag2Complex": ("x", lambda x: real(1j * x)),
    "Conj": ("z", lambda z: real(cplx(z).conj())),
    "ComplexAbs": ("z", lambda z: cplx(z).abs()),
    "ComplexSquareAbs": ("z", lambda z: cplx(z).abs() ** 2),
    "ComplexAngle": ("z", lambda z: cplx(z).angle()),
    "ComplexSum": ("z", lambda z: real(cplx(z).sum(-1, keepdim=True))),
    "ComplexSumT": ("u, 6", lambda u: real(cplx(u).expand(-1, 3))),
    "ComplexAdd": ("u, z", lambda u, z: real(cplx(u) + cplx(z))),
    "ComplexSubtract": ("z, u", lambda z, u: real(cplx(z) - cplx(u))),
    "ComplexMult": ("z, -z + 1", lambda z: real(cplx(z) * cplx(1 - z))),
    "ComplexScal": ("u, z", lambda u, z: real(cplx(u) * cplx(z))),
    "ComplexRealScal": ("z, s", lambda z, s: z * s),
    "ComplexDivide": ("z, u", lambda z, u: real(cplx(z) / cplx(u))),
    "ComplexExp": ("z", lambda z: real(cplx(z).exp())),
    "ComplexExp1j": ("x", lambda x: real(torch.exp(1j * x))),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_function(name):
    """Value and first and second derivatives against torch."""
    text, dense = DENSE[name]
    if "KNOTS" in text:
        table = ", ".join(f"({' + '.join(f'Elem(a, {k})' for k in range(n + 1))}) / 5" for n in range(9))
        text = text.replace("KNOTS", f"[{table}]")
    e = parse(f"{name}({text})", ALIASES)
    point = [t.requires_grad_() for t in tensors()]
    used = [point[list(DIMS).index(n)] for n in _names(dense, name, text)]
    expected = dense(*used)
    torch.testing.assert_close(value(e, point), expected, rtol=1e-12, atol=1e-13)
    wanted = list(variables(e).values())
    cotangent = variable(len(point), e.dim, 0)
    c = torch.rand(5, e.dim, dtype=torch.float64)
    for v, g in zip(wanted, grad.pullback({e: cotangent}, wanted), strict=True):
        t = point[v.params[0]]
        reference = None
        if expected.requires_grad:
            (reference,) = torch.autograd.grad(expected, t, c, create_graph=True, allow_unused=True)
        if g is None:
            assert reference is None or not reference.any()
            continue
        torch.testing.assert_close(value(g, [*point, c]), reference, rtol=1e-10, atol=1e-11)
        (second,) = grad.pullback({g: const(1)}, [v])
        if second is not None and reference.requires_grad:
            (again,) = torch.autograd.grad(reference.sum(), t, allow_unused=True, retain_graph=True)
            again = torch.zeros_like(t) if again is None else again
            torch.testing.assert_close(value(second, [*point, c]), again, rtol=1e-8, atol=1e-9)


def _names(dense, name, text):
    """The variables that a row reads, in the order of its lambda's parameters."""
    written = [n for n in text.replace("(", " ").replace(",", " ").replace(")", " ").split() if n in DIMS]
    unique = list(dict.fromkeys(written))
    count = len(inspect.signature(dense).parameters) if name not in ("Factorize",) else 1
    return unique[:count]


def test_bspline_with_repeated_knots():
    """An open uniform spline sums to one inside; 0 / 0 counts as 0, in the gradient too."""
    e = parse("BSpline([0, 0, 0, 0, 0.5, 1, 1, 1, 1], s, 3)", ALIASES)
    t = torch.linspace(0, 0.999, 7, dtype=torch.float64)[:, None]
    point = [torch.zeros(7, d, dtype=torch.float64) for d in DIMS.values()]
    point[2] = t
    knots = torch.tensor([[0, 0, 0, 0, 0.5, 1, 1, 1, 1]], dtype=torch.float64).expand(7, -1)
    torch.testing.assert_close(value(e, point), bspline(knots, t, 3))
    torch.testing.assert_close(value(e, point).sum(-1), torch.ones(7, dtype=torch.float64))
    g = grad.grad(e, S, const(1))
    torch.testing.assert_close(value(g, point), torch.zeros(7, 1, dtype=torch.float64), atol=1e-13, rtol=0)


def test_soft_dtw_of_equal_sequences_has_symmetric_gradients():
    """Ties of the minimum share the gradient; a hard minimum plus a correction would give it to one side."""
    e = parse("SoftDTW_SqDist(x, y, s)", ALIASES)
    point = tensors()
    point[0] = point[1] = torch.tensor([[0.0, 1.0, 0.0]] * 5, dtype=torch.float64)
    gx, gy = (value(grad.grad(e, v, const(1)), point) for v in (X, Y))
    torch.testing.assert_close(gx, gy)


def test_weighted_norms_choose_by_dimension():
    for weight, same in (("s", "SqNormIso(s, x)"), ("y", "SqNormDiag(y, x)"), ("a", "SymSqNorm(a, x)")):
        assert parse(f"WeightedSqNorm({weight}, x)", ALIASES) is parse(same, ALIASES)


def test_matern_of_a_norm_is_that_of_the_points():
    for name in ("Matern12", "Matern32", "Matern52"):
        assert parse(f"{name}(Norm2(x - y))", ALIASES) is parse(f"{name}(x, y)", ALIASES)


def test_operators_of_linear_maps():
    """Grad, GradMatrix, Diff, Divergence, Laplacian, trace, adjoint and sum in formula text."""
    point = tensors()
    x, y = point[0], point[1]
    torch.testing.assert_close(value(parse("Laplacian(Exp(-SqNorm2(x)), x)", ALIASES), point),
                               (4 * norm2(x) - 6) * torch.exp(-norm2(x)))  # fmt: skip
    torch.testing.assert_close(value(parse("Divergence(x * Norm2(x), x)", ALIASES), point), 4 * norm2(x).sqrt())
    matrix = parse("GradMatrix(MatVecMult(a, x), x)", ALIASES)
    torch.testing.assert_close(value(matrix, point), point[3])
    torch.testing.assert_close(
        value(parse("TraceOperator(MatVecMult(a, x), x)", ALIASES), point), point[3][:, ::4].sum(-1, keepdim=True)
    )
    adjoint = value(parse("AdjointOperator(MatVecMult(a, x), x, y)", ALIASES), point)
    torch.testing.assert_close(adjoint, torch.einsum("ri,rij->rj", y, point[3].reshape(-1, 3, 3)))
    total = value(parse("SumLinOperator(MatVecMult(a, x), x)", ALIASES), point)
    torch.testing.assert_close(total, point[3].sum(-1, keepdim=True))
    assert math.isclose(value(parse("TraceOperator(2 * x, x)", ALIASES), point)[0], 6)
    assert parse("Grad(Norm2(x), x)", ALIASES) is parse("Grad(Norm2(x), x, 1)", ALIASES)

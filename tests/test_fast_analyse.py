"""Which formulas are sums over differences: by what they say, not by how they are spelled."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import pullback as pb
from pullback.kernels import fast
from pullback.kernels.codegen import eager
from pullback.kernels.fast.analyse import Refused, analyse
from pullback.kernels.fast.polynomials import expression, polynomial
from pullback.kernels.formula import parse
from pullback.kernels.ir.expr import PARAMETER, I, J, const, substitute, variable

N = 3000
ARGUMENTS = ["x = Vi(D)", "y = Vj(D)", "b = Vj(2)", "s = Pm(1)", "w = Pm(D)", "S = Pm(DD)", "f = Vi(1)", "g = Vj(1)"]

SQUARES = "SqNorm2(x)+SqNorm2(y)-2*(x|y)"
SPELLINGS = [
    # |x - y|^2, multiplied out
    f"Exp(-({SQUARES}))*b",
    f"Exp(-Sqrt({SQUARES}+0.01))*b",
    f"Inv(1+{SQUARES})*b",
    f"Exp(-Square({SQUARES}))*b",
    f"Pow(1+{SQUARES},-2)*b",
    f"({SQUARES})*Exp(-s*SqDist(x,y))*b",
    f"({SQUARES})*Exp(-s*({SQUARES}))*b",
    f"Exp(-({SQUARES})/2)*Exp(-Norm2(x-y))*b",
    "Exp(-Sum(Square(x)+Square(y)-2*x*y))*b",
    "Exp(-(x|x)-(y|y)+(x|y)+(y|x))*b",
    "Exp(-(x-y|x-y))*b",
    "Exp(-s*SqNorm2(x)+IntCst(2)*s*(x|y)-s*SqNorm2(y))*b",
    "Exp((2*(x|y)-SqNorm2(x)-SqNorm2(y))/(2*s*s))*b",
    "Exp(-0.3*SqNorm2(x)+0.6*(x|y)-0.3*SqNorm2(y))*b",
    "Log(3+s+SqNorm2(x)+SqNorm2(y)+2*(x|y))*b",  # |x + y|^2
    "Sqrt(1+SqNorm2(x)-4*(x|y)+4*SqNorm2(y))*b",  # |x - 2 y|^2
    "Sqrt(1+s*s*SqNorm2(x)-2*s*(x|y)+SqNorm2(y))*b",  # |s x - y|^2
    "Exp(-WeightedSqNorm(w,x)-WeightedSqNorm(w,y)+2*(x|w*y))*b",
    "Sqrt(1+WeightedSqNorm(w,x)+WeightedSqNorm(w,y)-2*(w*x|y))*b",
    "Exp(-SymSqNorm(S,x)-SymSqNorm(S,y)+(x|MatVecMult(S,y))+(y|MatVecMult(S,x)))*b",
    "Sqrt(1+SqNorm2(MatVecMult(S,x))+SqNorm2(MatVecMult(S,y))-2*(MatVecMult(S,x)|MatVecMult(S,y)))*b",
    # functions of x and of y left over in exponents
    "Exp(-s*SqNorm2(x))*Exp(2*s*(x|y))*Exp(-s*SqNorm2(y))*b",
    "Exp(-s*SqNorm2(x)-s*SqNorm2(y))*Exp(2*s*(x|y))*b",
    "Exp(2*s*(x|y))/(Exp(s*SqNorm2(x))*Exp(s*SqNorm2(y)))*b",
    "Exp(s*(x|y))*b",
    "Exp(-s*(x|y))*b",
    "Exp(-SqNorm2(x)-2*SqNorm2(y)+2*s*(x|y))*b",
    f"Exp(f-({SQUARES})/s+g)*b",
    "Exp(f+g)*Exp(-SqDist(x,y))*b",
    "Exp(-SqDist(x,y))/(Exp(f)*Sqrt(1+Exp(g)))*b",
    # differences
    "Exp(-SqNorm2(x+(-1)*y))*b",
    "Exp(-SqNorm2((2*x-2*y)/2))*b",
    "Exp(-SqNorm2(x/s-y/s))*b",
    "Exp(-SqNorm2(x*w-y*w))*b",
    "Exp(-SqNorm2(x/w-y/w))*b",
    "Exp(-SqNorm2((x+w)-(w+y)))*b",
    "Exp(-SqNorm2(3*(x-y)))*Exp(-SqNorm2(y-x))*b",
    "Exp(-Norm2(-(x-y)))*b",
    "Exp(-Sqrt(Sum(Square(x-y))))*b",
    "Exp(-Sqrt(SqDist(x,y)))*b",
    "Exp(-SqNorm2(x-2*y))*b",
    "Exp(-Norm2(x-y-w))*b",
    "Exp(-Norm2((x+w)-(y-s)))*b",
    "Exp(-SqNorm2(MatVecMult(S,x-y)))*b",
    "Exp(-SqNorm2(MatVecMult(S,x)-MatVecMult(S,y)))*b",
    "Exp(-WeightedSqDist(s,x,y))*b",
    "Exp(-WeightedSqDist(w,x,y))*b",
    "Exp(-WeightedSqDist(S,x,y))*b",
    # sums and products of kernels
    "Exp(-SqDist(x,y))*Exp(-Norm2(x-y))*b+Inv(1+SqDist(x,y))*b",
    f"(Exp(-SqDist(x,y))+s*Exp(-4*({SQUARES})))*b",
    "Exp(-SqDist(x,y))*(x|y)*b",
    # derivatives: k x - k y is k (x - y)
    f"Grad(Exp(-s*({SQUARES})),x,Elem(b,0))",
    f"Grad(Sqrt(s+{SQUARES}),y,Elem(b,1))",
    "Grad(Exp(-s*(SqNorm2(x)-4*(x|y)+4*SqNorm2(y))),x,Elem(b,0))",
    f"GradMatrix(Grad(Exp(-s*({SQUARES})),x),y)*Elem(b,0)",
]
BY_COMPONENT = [
    "Exp(-SqNorm2(Concat(Elem(x,0)-Elem(y,0),Elem(y,1)-Elem(x,1))))*b",
    "Exp(-Square(Elem(x,0))-Square(Elem(y,0))+2*Elem(x,0)*Elem(y,0)-Square(Elem(x,1)-Elem(y,1)))*b",
    "Sqrt(3+Elem(x,0)*Elem(x,1)+Elem(y,0)*Elem(y,1)-Elem(x,0)*Elem(y,1)-Elem(x,1)*Elem(y,0))*b",
]
CASES = [*((text, d) for text in SPELLINGS for d in (1, 2, 3)), *((text, 2) for text in BY_COMPONENT)]


def genred(formula, d):
    arguments = [a.replace("DD", str(d * d)).replace("D", str(d)) for a in ARGUMENTS]
    return pb.Genred(formula, arguments, axis=1)


def data(d, dtype=torch.float64):
    g = torch.Generator().manual_seed(d)
    x, y = (torch.rand(n, d, dtype=dtype, generator=g) for n in (N, N + 5))
    b, f, h = (torch.randn(n, k, dtype=dtype, generator=g) for n, k in ((N + 5, 2), (N, 1), (N + 5, 1)))
    w = 0.5 + torch.rand(d, dtype=dtype, generator=g)
    matrix = torch.randn(d, d, dtype=dtype, generator=g)
    return x, y, b, torch.tensor([0.7], dtype=dtype), w, (torch.eye(d, dtype=dtype) + 0.1 * matrix).reshape(-1), f, h


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Fast sums also where the exact ones are cheaper."""
    fast.clear()
    monkeypatch.setattr(sys.modules["pullback.kernels.fast.choose"], "FEW", 0.0)


@pytest.mark.parametrize(("formula", "d"), CASES)
def test_the_formula_is_read(formula, d):
    form = analyse(genred(formula, d).reducer.programs[0])
    assert len(form.coordinates) == d
    assert agree(formula, d)


SLOW = [pytest.param(*c, marks=() if c[1] == 2 and k % 15 == 4 else pytest.mark.slow) for k, c in enumerate(CASES)]


@pytest.mark.parametrize(("formula", "d"), SLOW)
def test_its_sum_is_right(formula, d):
    f, args, tolerance = genred(formula, d), data(d), 1e-8 if d < 3 else 1e-4
    with fast.watch() as done:
        found = f(*args, tolerance=tolerance)
    assert [info.method for info in done] in (["fourier"], ["tree"])
    assert relative(found, f(*args)) < tolerance


REFUSED = [
    ("Cos((x|y))*b", "Cos mixes i and j"),
    ("Sqrt(3-2*(x|y))*b", "Sqrt mixes i and j"),
    ("Exp(Square((x|y)))*b", "6 coordinates"),
    ("Exp(-SqDist(x,y)*f)*b", "Exp mixes i and j"),
    ("Exp(-SqDist(x,y)*g)*b", "Exp mixes i and j"),
    ("Exp(-SqDist(x,y))*Cos((x|y))*b", "Cos mixes i and j"),
    ("Sqrt(SqNorm2(x)+2*SqNorm2(y)-2*(x|y))*b", "Sqrt mixes i and j"),
    ("Sqrt(SqNorm2(x)+SqNorm2(y)-s*(x|y))*b", "Sqrt mixes i and j"),
    ("Sqrt(SymSqNorm(S,x)+SymSqNorm(S,y)-2*(x|MatVecMult(S,y)))*b", "Sqrt mixes i and j"),
    ("Exp(-SqDist(x,y))*Exp(-Square(f-g))*b", "4 coordinates"),
    ("Exp(-Square(Index(0)-Index(1)))*b", "numbers of rows or columns"),
    ("(x|y)*b", "no function of a difference"),
]


@pytest.mark.parametrize(("formula", "why"), REFUSED)
def test_what_is_no_fast_sum_says_why(formula, why):
    with pytest.raises(Refused, match=why):
        analyse(genred(formula, 3).reducer.programs[0])


@pytest.mark.parametrize("squares", [SQUARES, "SqNorm2(x)-4*(x|y)+4*SqNorm2(y)"])
@pytest.mark.parametrize("side", "xy")
def test_derivatives_of_squares_multiplied_out_have_one_term(squares, side):
    f = genred(f"Grad(Exp(-s*({squares})),{side},Elem(b,0))", 3)
    assert [len(terms) for terms in analyse(f.reducer.programs[0]).components[0]] == [1, 1, 1]


def test_what_is_no_coordinate_is_forgotten():
    f = genred("Square(Elem(x,0)+Elem(y,1)+(x|y))*Exp(-SqDist(x,y))*b", 3)
    assert len(analyse(f.reducer.programs[0]).coordinates) == 3


def test_exponentials_that_cancel_leave_no_factor():
    f = genred("Exp(-s*SqNorm2(x))*Exp(2*s*(x|y))/Exp(s*SqNorm2(y))*Elem(b,0)", 3)
    ((term,),) = analyse(f.reducer.programs[0]).components[0]
    assert term.a is None and str(term.b) == "Gather(Var(2,2,1),[0])"


def test_exponentials_that_cancel_in_part_leave_the_rest():
    f = genred("Exp(-s*SqNorm2(x))*(Exp(s*SqNorm2(x)+f)*Exp(-SqDist(x,y)))*Elem(b,0)", 3)
    ((term,),) = analyse(f.reducer.programs[0]).components[0]
    assert str(term.a) == "Exp(Var(6,1,0))"


def test_equal_coordinates_are_one():
    for text in (
        "Exp(-SqNorm2(x/s-y/s))*Exp(-Norm2(y*w-x*w))*Inv(1+SqNorm2(2*x-y-y))*b",
        "Exp(-SqNorm2((x+w)-(y+w)))*Exp(-Norm2(x+1-y-1))*Inv(1+SqDist(y,x))*b",
        "Exp(-SqNorm2(x)+(x|y)-SqNorm2(y))*Exp(-Norm2(x-y))*b",
        "Exp(-SqNorm2(x-s*y))*Exp(-Norm2(x/s-y))*b",
    ):
        assert len(analyse(genred(text, 3).reducer.programs[0]).coordinates) == 3


def test_high_dimensions_are_refused_quickly():
    for text in ("Exp(-SqDist(x,y))*b", f"Exp(-({SQUARES}))*b"):
        with pytest.raises(Refused, match=r"more than 16 coordinates|mixes i and j"):
            analyse(genred(text, 40).reducer.programs[0])


def lazies():
    x, y = (torch.rand(n, 3, dtype=torch.float64) for n in (N, N + 5))
    x_i, y_j, s = pb.Vi(x), pb.Vj(y), 0.3
    yield (-((x_i**2).sum(-1) + (y_j**2).sum(-1) - 2 * (x_i * y_j).sum(-1)) / s).exp()
    yield (-(x_i.sqnorm2() + y_j.sqnorm2() - 2 * (x_i | y_j)) / (2 * s**2)).exp()
    yield (-((x_i | x_i) - 2 * (x_i | y_j) + (y_j | y_j) + 1e-3).sqrt() / s).exp()
    yield (-(x_i.sqnorm2() * pb.Pm(torch.tensor([2.0], dtype=torch.float64)))).exp() * (-y_j.sqdist(x_i)).exp()
    yield (-(x_i / s - y_j / s).norm2()).exp()
    yield 1 / (1 + sum((x_i[:, :, k] - y_j[:, :, k]) ** 2 for k in range(3)))
    yield (-((x_i - y_j) ** 2 * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).sum(-1)).exp()
    yield (-(x_i - y_j).weightedsqnorm(torch.eye(3, dtype=torch.float64).reshape(-1))).exp()


@pytest.mark.parametrize("k", range(8))
def test_lazy_tensors_are_read(k):
    torch.manual_seed(k)
    K = list(lazies())[k]
    b = torch.randn(N + 5, dtype=torch.float64)
    with fast.watch() as done:
        found = K.with_tolerance(1e-4) @ b
    assert [info.method for info in done] in (["fourier"], ["tree"])
    assert relative(found, K @ b) < 1e-4


def test_logsumexp_of_scalar_products_is_fast():
    x, y, b, s, *_ = data(2)
    x_i, y_j = pb.Vi(3 * x), pb.Vj(3 * y)
    F = (x_i | y_j) / pb.Pm(s)
    with fast.watch() as done:
        found, mean = F.logsumexp(1, tolerance=1e-6), F.sumsoftmaxweight(pb.Vj(b), axis=1, tolerance=1e-6)
    assert all(info.method != "exact" for info in done)
    assert relative(found, F.logsumexp(1)) < 1e-6
    assert relative(mean, F.sumsoftmaxweight(pb.Vj(b), axis=1)) < 1e-5


def test_squares_multiplied_out_are_more_accurate_far_from_the_origin():
    x, y = (1000 + torch.rand(N, 2, dtype=torch.float64) for _ in range(2))
    b, s = torch.randn(N, 1, dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    names = ["x = Vi(2)", "y = Vj(2)", "b = Vj(1)", "s = Pm(1)"]
    plain = pb.Genred("Exp(-s*SqDist(x,y))*b", names, axis=1)
    spelled = pb.Genred(f"Exp(-s*({SQUARES}))*b", names, axis=1)
    found = spelled(x, y, b, s, tolerance=1e-7)
    assert relative(found, plain(x, y, b, s)) < 1e-7


# Polynomials ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("(x+y)*(x-y)", "x*x-y*y"),
        ("Square(x+y)/s", "x*x/s+2*y*x*Inv(s)+Pow(y,2)/s"),
        ("x/s*s", "x"),
        ("0.1*x+0.2*x-0.3*x", "0*y"),
        ("Exp(x)*s*Exp(x)", "s*Square(Exp(x))"),
        ("Sum(Concat(x,y)*Concat(y,x))", "2*x*y"),
        ("-(x-1)", "1-x"),
    ],
)
def test_equal_polynomials_are_equal(one, other):
    names = {"x": variable(0, 1, I), "y": variable(1, 1, J), "s": variable(2, 1, PARAMETER)}
    p, q = (polynomial(parse(text, names)) for text in (one, other))
    assert p == q
    assert polynomial(expression(p)) == p


def test_what_is_no_polynomial_is_an_atom():
    x = variable(0, 1, I)
    e = parse("Exp(x)+Sqrt(x)*x", {"x": x})
    assert len(polynomial(e)) == 2
    assert polynomial(const(0.0)) == {}


# The terms are the formula -------------------------------------------------------------------------------------------


def written(form, n):
    """The terms of a form as expressions again."""
    table = {variable(n + k, 1, I): u - v for k, (u, v) in enumerate(form.coordinates)}
    one = const(1.0)
    for terms in form.components[0]:
        yield sum(((t.a or one) * substitute(t.k or one, table) * (t.b or one) for t in terms), const(0.0))


def agree(formula, d):
    """Whether the terms have the values of the formula, at random pairs; None if it is refused."""
    f = genred(formula, d)
    try:
        form = analyse(f.reducer.programs[0])
    except Refused:
        return None
    g = torch.Generator().manual_seed(0)
    values = [0.5 + torch.rand(40, dim, dtype=torch.float64, generator=g) for dim, _ in f.reducer.signature]
    (want,) = eager.evaluate([f.reducer.programs[0].exprs[0]], values)
    parts = eager.evaluate(list(written(form, form.program.n)), values)
    found = torch.cat([p.expand(40, 1) for p in parts], -1)
    return bool(torch.allclose(found, want.expand_as(found), rtol=1e-9, atol=1e-9 * float(want.abs().max())))


LINEAR = ["(x-y)", "(y-x)", "(2*x-y-y)", "(x/s-y/s)", "(w*(x-y))", "(x*w-y*w)", "(x+w-(y+w))", "(x-2*y)", "(x+y)"]
NUMBERS = ["1", "0.3", "s", "Elem(w,0)", "f", "g", "Elem(x,0)", "Elem(y,0)", "Exp(f)", "Exp(-g)", "SqNorm2(x)", "(x|y)"]


def squares_of(draw):
    c, p, q = (draw(st.sampled_from(["1", "2", "0.7", "s", "(1+s)"])) for _ in range(3))
    return draw(
        st.sampled_from(
            [
                "SqDist(x,y)",
                SQUARES,
                f"{c}*SqNorm2(x)+{c}*SqNorm2(y)-2*{c}*(x|y)",
                f"{c}*{c}*SqNorm2(x)+SqNorm2(y)-2*{c}*(x|y)",
                f"{p}*SqNorm2(x)-{q}*(x|y)+{c}*SqNorm2(y)",
                "WeightedSqNorm(w,x-y)",
                "WeightedSqNorm(w,x)-2*(w*x|y)+WeightedSqNorm(w,y)",
                "SymSqNorm(S,x)+SymSqNorm(S,y)-(x|MatVecMult(S,y))-(y|MatVecMult(S,x))",
                f"SqNorm2({draw(st.sampled_from(LINEAR))})",
            ]
        )
    )


@st.composite
def formulas(draw, depth=2):
    if depth == 0:
        return draw(st.sampled_from(NUMBERS))
    inner = lambda: draw(formulas(depth=depth - 1))  # noqa: E731
    kind = draw(st.integers(0, 6))
    if kind <= 2:
        q, n = squares_of(draw), draw(st.sampled_from(NUMBERS[:3]))
        more = draw(st.sampled_from(["", "+f", "-g", "+f-g", "-Elem(x,0)+Elem(y,0)", f"+{n}*(x|y)"]))
        return draw(
            st.sampled_from([f"Exp(-({q}){more})", f"Inv(9+{n}*({q}))", f"Sqrt(9+{q})", f"Exp(-({q})/{n})", f"({q})"])
        )
    if kind == 3:
        return f"({inner()}+{inner()})"
    if kind == 4:
        return f"({inner()}*{inner()})"
    if kind == 5:
        return f"({inner()}-{inner()})"
    return f"({inner()}/({draw(st.sampled_from(NUMBERS[:-1]))}))"


@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_terms_are_the_formula(examples):
    read = []

    @seed(examples)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(formulas(depth=3), st.integers(1, 3), st.sampled_from(["{}*b", "Grad({},x,Elem(b,0))", "Grad({},y,g)"]))
    def run(formula, d, use):
        found = agree(use.format(formula), d)
        assert found is not False
        read.append(found is True)

    run()
    assert sum(read) > 0.3 * len(read)

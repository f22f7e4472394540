"""Sums within a tolerance on point sets, kernels and weights that nobody chose: none may miss."""

import sys
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import pullback as pb
from pullback.kernels import fast

# "Q" stands for the squared distance: (x - y)^2, or multiplied out
KERNELS = {
    "gaussian": "Exp(-Q/(s*s))*b",
    "two gaussians": "(Exp(-Q/(s*s))+IntInv(2)*Exp(-Q/(IntCst(4)*s*s)))*b",
    "laplacian": "Exp(-Sqrt(Q)/s)*b",
    "matern": "(IntCst(1)+Sqrt(Q)/s)*Exp(-Sqrt(Q)/s)*b",
    "cauchy": "Inv(IntCst(1)+Q/(s*s))*b",
    "multiquadric": "Sqrt(s*s+Q)*b",
    "one over r": "Rsqrt(Q)*b",
    "log r": "Log(Q+s*s)*b",
    "logarithm of r": "Log(Q)*b",
    "distance": "Sqrt(Q)*b",
    "thin plate": "Q*Log(Q+s*s)*b",
    "gradient of a gaussian": "Exp(-Q/(s*s))*(x-y)*b",
    "derivative of a gaussian": "Grad(Exp(-Q/(s*s)),x,b)",
    "derivative of a multiquadric": "Grad(Sqrt(s*s+Q),y,b)",
    "laplacian of a gaussian": "(2-4*Q/(s*s))*Exp(-Q/(s*s))*b",
    "oscillating": "Cos(Sqrt(Q)/s)*Exp(-Sqrt(Q)/(4*s))*b",
    "wave": "Cos(3*Sqrt(Q)/s)*b",
    "gaussian of scaled points": "Exp(-SqNorm2(x/s-y/s))*b",
    "gaussian in factors": "Exp(-SqNorm2(x)/(s*s))*Exp(2*(x|y)/(s*s))*Exp(-SqNorm2(y)/(s*s))*b",
    "gaussian times x.y": "Exp(-Q/(s*s))*(x|y)*b",
    "exponential of x.y": "Exp((x|y)/(s*s))*b",
}
SQUARES = {
    "difference": "SqDist(x,y)",
    "multiplied out": "(SqNorm2(x)+SqNorm2(y)-IntCst(2)*(x|y))",
    "by component": "Sum(Square(x)+Square(y)-2*x*y)",
    "scaled": "((2*SqNorm2(x)-4*(x|y)+2*SqNorm2(y))/2)",
}
CLOUDS = ["uniform", "clustered", "collinear", "duplicated", "shifted", "tiny", "one point"]


def cloud(kind, n, d, generator):
    x = torch.rand(n, d, dtype=torch.float64, generator=generator)
    if kind == "clustered":
        x = x * 0.01 + torch.randint(0, 3, (n, 1), generator=generator)
    elif kind == "collinear":
        x = x[:, :1] * torch.arange(1.0, d + 1, dtype=torch.float64)
    elif kind == "duplicated":
        x = x[torch.randint(0, max(1, n // 10), (n,), generator=generator)]
    elif kind == "shifted":
        x = x + 1000.0
    elif kind == "tiny":
        x = x * 1e-5
    elif kind == "one point":
        x = x[:1].expand(n, d).clone()
    return x


def weights(kind, y, generator):
    """(weights, sources): dipoles are pairs of near sources with opposite weights, whose sums nearly cancel."""
    b = torch.randn(len(y), 1, dtype=torch.float64, generator=generator)
    if kind == "positive":
        b = b.abs()
    elif kind == "zero sum":
        b = b - b.mean()
    elif kind == "dipoles":
        half = len(y) // 2
        b[half : 2 * half], b[2 * half :] = -b[:half], 0.0
        y = y.clone()
        y[half : 2 * half] = y[:half] + 1e-3 * (y.amax(0) - y.amin(0)) * torch.rand(
            half, y.shape[1], dtype=torch.float64, generator=generator
        )
    return b, y


def cases():
    return st.fixed_dictionaries(
        {
            "kernel": st.sampled_from(sorted(KERNELS)),
            "squares": st.sampled_from(sorted(SQUARES)),
            "d": st.integers(1, 3),
            "clouds": st.tuples(st.sampled_from(CLOUDS), st.sampled_from(CLOUDS)),
            "sizes": st.tuples(st.integers(1, 2500), st.integers(1, 2500)),
            "bandwidth": st.floats(-3, 3).map(lambda e: 10.0**e),
            "weights": st.sampled_from(["positive", "signed", "zero sum", "dipoles"]),
            "tolerance": st.sampled_from([1e-2, 1e-4, 1e-6, 1e-8]),
            "same": st.booleans(),
            "how": st.sampled_from(["sum", "sum", "single precision", "batch", "transposed", "operator"]),
            "seed": st.integers(0, 1 << 30),
        }
    )


def sums(case, formula, tolerance=None):
    """The sum of a case in its way, and its sum with |b|; of data that are the same in each call."""
    generator = torch.Generator().manual_seed(case["seed"])
    d, (m, n), how = case["d"], case["sizes"], case["how"]
    x = cloud(case["clouds"][0], m, d, generator)
    y = x if case["same"] else cloud(case["clouds"][1], n, d, generator)
    b, y = weights(case["weights"], y, generator)
    s = torch.tensor([case["bandwidth"]], dtype=torch.float64)
    if how == "batch":
        x, b = torch.stack([x, 0.5 * x]), torch.stack([b, b.flip(0)])
    if how == "single precision":
        x, y, b, s = (t.to(torch.float32) for t in (x, y, b, s))
        if tolerance is None:
            x, y, b, s = (t.double() for t in (x, y, b, s))
    sides = ("Vj", "Vi", "Vi", 0) if how == "transposed" else ("Vi", "Vj", "Vj", 1)
    names = [f"x = {sides[0]}({d})", f"y = {sides[1]}({d})", f"b = {sides[2]}(1)", "s = Pm(1)"]
    f = pb.Genred(formula, names, axis=sides[3])
    return (lambda b: f(x, y, b, s, tolerance=tolerance)), b


def operator(case, formula, tolerance=None):
    """The adjoint of a kernel operator, applied to complex numbers."""
    generator = torch.Generator().manual_seed(case["seed"])
    d, (m, n) = case["d"], case["sizes"]
    x, y = (cloud(kind, k, d, generator) for kind, k in zip(case["clouds"], (m, n), strict=True))
    b, x = weights(case["weights"], x, generator)
    v = torch.complex(b[:, 0], b[:, 0].flip(0))
    distance = ((pb.Vi(x) - pb.Vj(y)) ** 2).sum(-1)
    if case["squares"] != "difference" and formula is None:
        distance = pb.Vi(x).sqnorm2() + pb.Vj(y).sqnorm2() - 2 * (pb.Vi(x) | pb.Vj(y))
    s = case["bandwidth"]
    K = (-distance / s**2).exp() if case["kernel"] < "l" else (1 + distance / s**2).sqrt()
    return K.with_tolerance(tolerance).operator().H, v


def holds(case):
    """Assert that a case keeps its tolerance; what the engine did."""
    make = operator if case["how"] == "operator" else sums
    formula = KERNELS[case["kernel"]]
    spelled = None if case["how"] == "operator" else formula.replace("Q", SQUARES[case["squares"]])
    plain = "" if case["how"] == "operator" else formula.replace("Q", "SqDist(x,y)")
    f, b = make(case, plain)
    true, size = f(b), f(b.abs())
    f, b = make(case, spelled)
    exact = f(b)
    f, b = make(case, spelled, case["tolerance"])
    with fast.watch() as done, warnings.catch_warnings():
        warnings.simplefilter("ignore", fast.ToleranceWarning)
        found = f(b)
    fast.clear()
    # what the exact sum of this spelling misses itself, and rounding
    own = float((exact - true).norm()) if bool(torch.isfinite(true).all()) else float("inf")
    rounding = 1e-14 * float(size.norm()) if bool(torch.isfinite(size).all()) else 0.0
    if case["how"] == "single precision":
        rounding += 1e-7 * float(exact.norm())
    if not bool(torch.isfinite(exact).all()):
        assert case["how"] == "single precision" or torch.equal(torch.isfinite(found), torch.isfinite(exact))
        return done
    if all(info.method == "exact" for info in done):
        assert case["how"] == "single precision" or float((found - exact).norm()) <= 2 * own + rounding
        return done
    error = min(float((found - t).norm()) for t in (exact, true))
    assert error <= case["tolerance"] * float(exact.norm()) + 2 * own + rounding, done
    return done


PARTS = [(15, 0), *(pytest.param(250, k, marks=pytest.mark.slow) for k in range(1, 5))]


@pytest.mark.parametrize(("examples", "start"), PARTS)
def test_no_sum_misses_its_tolerance(examples, start, monkeypatch):
    monkeypatch.setattr(sys.modules["pullback.kernels.fast.choose"], "FEW", 0.0)

    @seed(start)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def run(case):
        holds(case)

    run()

"""Sums within a tolerance on point sets, kernels and weights that nobody chose: none may miss."""

import sys
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import pullback as pb
from pullback.kernels import fast

KERNELS = {
    "gaussian": "Exp(-SqDist(x,y)/(s*s))*b",
    "two gaussians": "(Exp(-SqDist(x,y)/(s*s))+IntInv(2)*Exp(-SqDist(x,y)/(IntCst(4)*s*s)))*b",
    "laplacian": "Exp(-Norm2(x-y)/s)*b",
    "matern": "(IntCst(1)+Norm2(x-y)/s)*Exp(-Norm2(x-y)/s)*b",
    "cauchy": "Inv(IntCst(1)+SqDist(x,y)/(s*s))*b",
    "multiquadric": "Sqrt(s*s+SqDist(x,y))*b",
    "one over r": "Rsqrt(SqDist(x,y))*b",
    "log r": "Log(SqDist(x,y)+s*s)*b",
    "distance": "Norm2(x-y)*b",
    "thin plate": "SqDist(x,y)*Log(SqDist(x,y)+s*s)*b",
    "gradient of a gaussian": "Exp(-SqDist(x,y)/(s*s))*(x-y)*b",
}


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


def cases():
    return st.fixed_dictionaries(
        {
            "kernel": st.sampled_from(sorted(KERNELS)),
            "d": st.integers(1, 3),
            "clouds": st.tuples(
                *[st.sampled_from(["uniform", "clustered", "collinear", "duplicated", "shifted", "tiny", "one point"])]
                * 2
            ),
            "sizes": st.tuples(st.integers(1, 1500), st.integers(1, 1500)),
            "bandwidth": st.floats(-3, 3).map(lambda e: 10.0**e),
            "weights": st.sampled_from(["positive", "signed", "zero sum"]),
            "tolerance": st.sampled_from([1e-2, 1e-4, 1e-6, 1e-8]),
            "same": st.booleans(),
            "seed": st.integers(0, 1 << 30),
        }
    )


def holds(case):
    generator = torch.Generator().manual_seed(case["seed"])
    d, (m, n) = case["d"], case["sizes"]
    x = cloud(case["clouds"][0], m, d, generator)
    y = x if case["same"] else cloud(case["clouds"][1], n, d, generator)
    b = torch.randn(len(y), 1, dtype=torch.float64, generator=generator)
    b = b.abs() if case["weights"] == "positive" else b - b.mean() if case["weights"] == "zero sum" else b
    s = torch.tensor([case["bandwidth"]], dtype=torch.float64)
    f = pb.Genred(KERNELS[case["kernel"]], [f"x = Vi({d})", f"y = Vj({d})", "b = Vj(1)", "s = Pm(1)"], axis=1)
    exact = f(x, y, b, s)
    with fast.watch() as done, warnings.catch_warnings():
        warnings.simplefilter("ignore", fast.ToleranceWarning)
        found = f(x, y, b, s, tolerance=case["tolerance"])
    fast.clear()
    if not bool(torch.isfinite(exact).all()) or done[0].method == "exact":
        assert torch.equal(found.nan_to_num(), exact.nan_to_num())
        return done[0]
    assert float((found - exact).norm()) <= case["tolerance"] * float(exact.norm()), done
    return done[0]


PARTS = [(60, 0), *(pytest.param(250, k, marks=pytest.mark.slow) for k in range(1, 5))]


@pytest.mark.parametrize(("examples", "start"), PARTS)
def test_no_sum_misses_its_tolerance(examples, start, monkeypatch):
    monkeypatch.setattr(sys.modules["pullback.kernels.fast.choose"], "FEW", 0.0)

    @seed(start)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def run(case):
        holds(case)

    run()

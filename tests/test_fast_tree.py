"""Sums over far pairs by trees: every pair once, polynomials exactly, kernels within their tolerance."""

import math

import pytest
import torch

from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.kernels import Genred
from pullback.kernels.fast import balance, cells, far, interpolation, translations
from pullback.kernels.fast.far import FarField
from pullback.kernels.fast.tree import TreePlan

F64 = torch.float64


def rand(*shape):
    return torch.rand(*shape, dtype=F64)


def norm(d):
    return d.norm(dim=-1, keepdim=True)


KERNELS = {
    "exp": lambda d: torch.exp(-10 * norm(d)),
    "matern": lambda d: (1 + 17 * norm(d)) * torch.exp(-17 * norm(d)),
    "1/r": lambda d: 1 / norm(d),
    "log": lambda d: norm(d).log(),
    "r": norm,
    "multiquadric": lambda d: (1 + 100 * norm(d) ** 2).sqrt(),
    "cauchy": lambda d: 1 / (1 + 100 * norm(d) ** 2),
    "thin plate": lambda d: norm(d) ** 2 * norm(d).log(),
}


def near_mask(plan):
    """(M, N) in the original order, from the rows and from the columns of the pattern."""
    m, n = len(plan.rows), len(plan.columns)
    found = []
    for by_column in (False, True):
        mask = torch.zeros(m, n, dtype=torch.int64)
        for (a, b), spans in plan.near.blocks(by_column):
            for c, d in spans:
                if by_column:
                    mask[c:d, a:b] += 1
                else:
                    mask[a:b, c:d] += 1
        back = torch.zeros_like(mask)
        back[plan.rows[:, None], plan.columns] = mask
        found.append(back)
    assert torch.equal(*found) and (not found[0].numel() or int(found[0].max()) <= 1)
    assert int(found[0].sum()) == plan.n_near
    return found[0].bool()


def whole(plan, field, x, y, w, kernel):
    """The sum over all pairs, the near ones densely; and the definition."""
    k = torch.nan_to_num(kernel(x[:, None] - y), nan=0.0, posinf=0.0, neginf=0.0)  # (M, N, c)
    near = torch.einsum("mnc,nw->mcw", k * near_mask(plan)[..., None], w)
    return near + field.apply(w), torch.einsum("mnc,nw->mcw", k, w)


def error(got, want):
    return float((got - want).norm() / want.norm())


def cloud(name, n, dim):
    if name == "uniform":
        return rand(n, dim)
    if name == "clustered":
        centres = torch.rand(5, dim, dtype=F64, generator=torch.Generator().manual_seed(0))
        return centres[torch.randint(5, (n,))] + 0.01 * torch.randn(n, dim, dtype=F64)
    if name == "collinear":
        return rand(n, 1) * torch.arange(1.0, dim + 1, dtype=F64) + 3
    if name == "duplicated":
        return rand(max(n // 50, 1), dim)[torch.arange(n) % max(n // 50, 1)]
    if name == "shifted":
        return rand(n, dim) + 1e6
    if name == "outlier":
        return torch.cat([rand(max(n - 1, 0), dim), torch.full((min(n, 1), dim), 1e4, dtype=F64)])
    if name == "graded":
        return rand(n, dim) ** 6
    if name == "elsewhere":
        return rand(n, dim) * 0.3 + 2
    raise ValueError(name)


CLOUDS = ("uniform", "clustered", "collinear", "duplicated", "shifted", "outlier", "graded", "elsewhere")


# Every pair once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", CLOUDS)
def test_near_and_far_pairs_are_all_pairs_once(name, dim):
    torch.manual_seed(0)
    x, y = cloud(name, 700, dim), cloud("graded" if name == "uniform" else name, 500, dim)
    plan = TreePlan(x, y, 16)
    field = FarField(plan, lambda d: torch.ones_like(d[..., :1]), 1e-6, order=2)
    far_pairs = field.apply(torch.ones(500, 1, dtype=F64))[:, 0, 0]
    torch.testing.assert_close(far_pairs, (~near_mask(plan)).sum(1).double(), rtol=1e-12, atol=1e-9)
    assert sum(plan.far_pairs) + plan.n_near == 700 * 500
    back = field.apply(torch.ones(700, 1, dtype=F64), over_i=True)[:, 0, 0]
    torch.testing.assert_close(back, (~near_mask(plan)).sum(0).double(), rtol=1e-12, atol=1e-9)
    assert torch.equal(plan.rows.sort()[0], torch.arange(700)) and torch.equal(
        plan.columns.sort()[0], torch.arange(500)
    )


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_polynomials_are_exact(dim):
    torch.manual_seed(1)
    x, y, w = rand(600, dim), rand(500, dim) * 0.7, torch.randn(500, 3, dtype=F64)
    plan = TreePlan(x, y, 16)
    assert plan.n_near < 0.7 * 600 * 500

    def kernel(d):
        e = d * torch.arange(1.0, dim + 1, dtype=F64)
        return torch.stack([1 + e.sum(-1) ** 3, e[..., 0] - e.prod(-1)], -1)

    field = FarField(plan, kernel, 1e-12, order=4)
    got, want = whole(plan, field, x, y, w, kernel)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-9)
    v = torch.randn(600, 2, dtype=F64)
    far = (~near_mask(plan))[..., None] * kernel(x[:, None] - y)
    torch.testing.assert_close(field.apply(v, over_i=True), torch.einsum("mnc,mw->ncw", far, v), rtol=1e-11, atol=1e-9)


# Kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_keep_their_tolerance(name, dim):
    torch.manual_seed(2)
    kernel = KERNELS[name]
    x, y, w = rand(900, dim), rand(800, dim), rand(800, 1)
    plan = TreePlan(x, y, 16)
    for tolerance in (1e-2, 1e-4) if dim == 3 else (1e-2, 1e-5, 1e-8):
        got, want = whole(plan, FarField(plan, kernel, tolerance), x, y, w, kernel)
        assert error(got, want) < tolerance


@pytest.mark.parametrize(
    "name", [*CLOUDS[1:5], *(pytest.param(n, marks=pytest.mark.slow) for n in (*CLOUDS[5:], "uniform"))]
)
def test_clouds_keep_their_tolerance(name):
    torch.manual_seed(3)
    for dim in (1, 2, 3):
        x, y, w = cloud(name, 600, dim), cloud(name, 700, dim), rand(700, 1)
        for kernel in (KERNELS["1/r"], KERNELS["exp"]):
            plan = TreePlan(x, y, 16)
            got, want = whole(plan, FarField(plan, kernel, 1e-4), x, y, w, kernel)
            assert error(got, want) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1/r", "exp", "multiquadric"])
def test_tight_tolerance_in_three_dimensions(name):
    torch.manual_seed(4)
    x, w = rand(1200, 3), rand(1200, 1)
    plan = TreePlan(x, x, 20)
    got, want = whole(plan, FarField(plan, KERNELS[name], 1e-8), x, x, w, KERNELS[name])
    assert error(got, want) < 1e-8


def test_the_order_follows_the_kernel_and_the_tolerance():
    torch.manual_seed(5)
    x = rand(3000, 2)
    plan = TreePlan(x, x, 20)
    orders = [FarField(plan, KERNELS["1/r"], t).order for t in (1e-2, 1e-4, 1e-6, 1e-8)]
    assert orders == sorted(orders) and orders[0] < orders[-1]
    assert FarField(plan, lambda d: torch.exp(-norm(d)), 1e-6).order < FarField(plan, KERNELS["matern"], 1e-6).order
    fields = [FarField(plan, KERNELS["1/r"], 1e-6, order=p) for p in (3, 5, 7)]
    assert fields[0].error > 10 * fields[1].error > 100 * fields[2].error
    ranks = [
        max(t[0].up.shape[1] for t in FarField(plan, KERNELS["1/r"], t, order=9).translations(False, F64).values())
        for t in (1e-2, 1e-5, 1e-8)
    ]
    assert ranks[0] < ranks[1] < ranks[2] < 81


def test_levels_where_the_kernel_vanishes_cost_nothing():
    torch.manual_seed(6)
    x = rand(4000, 2)
    plan = TreePlan(x, x, 20)
    ranks = [
        t[0].up.shape[1]
        for t in FarField(plan, lambda d: torch.exp(-300 * norm(d)), 1e-4).translations(False, F64).values()
    ]
    assert ranks[0] == 0 and ranks[-1] > 0
    field = FarField(plan, lambda d: torch.exp(-1e6 * norm(d)), 1e-4)
    assert not field.apply(rand(4000, 1)).any()


# Arguments of apply -----------------------------------------------------------------------------------------


def test_channels_are_sums_of_products(monkeypatch):
    torch.manual_seed(7)
    x, y, w = rand(500, 2), rand(400, 2), torch.randn(400, 3, dtype=F64)
    plan = TreePlan(x, y, 16)
    kernel = lambda d: torch.cat([norm(d), d, 1 / norm(d)], -1)  # noqa: E731
    field = FarField(plan, kernel, 1e-6)
    every = field.apply(w)
    assert every.shape == (500, 4, 3)
    channels = [[(0, 0), (3, 2)], [(1, 1)], [(2, 1), (2, 2), (0, 0)]]
    want = torch.stack([sum(every[:, c, r] for c, r in pairs) for pairs in channels], 1)
    torch.testing.assert_close(field.apply(w, channels=channels), want, rtol=1e-12, atol=1e-10)
    one = torch.cat([field.apply(w[:, r : r + 1]) for r in range(3)], 2)
    torch.testing.assert_close(one, every, rtol=1e-12, atol=1e-10)
    monkeypatch.setattr(far, "_HELD", 1)
    monkeypatch.setattr(far, "_GATHERED", 100)
    monkeypatch.setattr(interpolation, "_CHUNK", 500)
    monkeypatch.setattr(translations, "_EVALUATED", 100)
    torch.testing.assert_close(FarField(plan, kernel, 1e-6).apply(w), every, rtol=1e-12, atol=1e-10)
    assert field.apply(w[:, :0]).shape == (500, 4, 0) and field.apply(w, channels=[]).shape == (500, 0)


@pytest.mark.slow
def test_sums_over_i_are_the_adjoint():
    torch.manual_seed(8)
    x, y = rand(600, 3), rand(500, 3) * 0.8
    kernel = lambda d: d[..., :1] / norm(d) ** 3  # noqa: E731
    plan = TreePlan(x, y, 16)
    field = FarField(plan, kernel, 1e-5)
    far_values = kernel(x[:, None] - y)[..., 0] * ~near_mask(plan)
    v, w = torch.randn(600, 1, dtype=F64), torch.randn(500, 1, dtype=F64)
    size = float(far_values.abs().sum())
    assert float((field.apply(w)[:, 0] - far_values @ w).abs().sum()) < 1e-5 * size
    assert float((field.apply(v, over_i=True)[:, 0] - far_values.T @ v).abs().sum()) < 1e-5 * size
    flipped = FarField(TreePlan(y, x, 16), lambda d: kernel(-d), 1e-5)
    assert float((field.apply(v, over_i=True) - flipped.apply(v)).abs().sum()) < 1e-5 * size


def test_the_engine_sums_the_near_pairs():
    torch.manual_seed(9)
    x, y, b = rand(2000, 3), rand(1500, 3), rand(1500, 1)
    plan = TreePlan(x, y, 30)
    exact = Genred("Exp(-Norm2(x-y))*b", ["x=Vi(3)", "y=Vj(3)", "b=Vj(1)"], reduction_op="Sum", axis=1)
    got = FarField(plan, lambda d: torch.exp(-norm(d)), 1e-6).apply(b)[:, 0]
    got[plan.rows] += exact(x[plan.rows], y[plan.columns], b[plan.columns], ranges=plan.near)
    assert error(got, exact(x, y, b)) < 1e-6
    back = Genred("Exp(-Norm2(x-y))*a", ["x=Vi(3)", "y=Vj(3)", "a=Vi(1)"], reduction_op="Sum", axis=0)
    a = rand(2000, 1)
    got = FarField(plan, lambda d: torch.exp(-norm(d)), 1e-6).apply(a, over_i=True)[:, 0]
    got[plan.columns] += back(x[plan.rows], y[plan.columns], a[plan.rows], ranges=plan.near)
    assert error(got, back(x, y, a)) < 1e-6


def test_float32():
    torch.manual_seed(10)
    x, y, w = rand(900, 2).float(), rand(800, 2).float(), rand(800, 1).float()
    plan = TreePlan(x, y, 16)
    field = FarField(plan, KERNELS["1/r"], 1e-5)
    got = field.apply(w)
    assert got.dtype == torch.float32
    assert error(got.double(), field.apply(w.double())) < 1e-6
    double, want = whole(plan, field, x.double(), y.double(), w.double(), KERNELS["1/r"])
    assert error(double, want) < 1e-5


# Odd points -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(0, 0), (0, 300), (300, 0), (1, 1), (1, 5000), (5000, 1)])
def test_few_points(sizes, dim):
    torch.manual_seed(11)
    x, y = rand(sizes[0], dim), rand(sizes[1], dim)
    plan = TreePlan(x, y, 16)
    field = FarField(plan, KERNELS["1/r"], 1e-4)
    got = field.apply(torch.ones(sizes[1], 2, dtype=F64))
    assert got.shape == (sizes[0], 1, 2) and bool(torch.isfinite(got).all())
    assert sum(plan.far_pairs) + plan.n_near == sizes[0] * sizes[1]
    if min(sizes):
        got, want = whole(plan, field, x, y, torch.ones(sizes[1], 2, dtype=F64), KERNELS["1/r"])
        assert error(got, want) < 1e-4


@pytest.mark.parametrize("scale", [1e-310, 1e-150, 1e150, 1.7e308])
def test_extreme_extents(scale):
    torch.manual_seed(12)
    x = (rand(400, 2) - 0.5) * 2 * scale
    plan = TreePlan(x, x, 16)
    assert sum(plan.far_pairs) + plan.n_near == 400 * 400
    near_mask(plan)
    if scale in (1e-150, 1e150):
        assert plan.n_near < 400 * 400 // 3
        kernel = lambda d: norm(d / scale)  # noqa: E731
        got, want = whole(plan, FarField(plan, kernel, 1e-5), x, x, rand(400, 1), kernel)
        assert error(got, want) < 1e-5


def test_all_points_in_one_place_are_near():
    x = torch.full((3000, 3), 7.0, dtype=F64)
    plan = TreePlan(x, x, 20)
    assert plan.n_near == 3000**2 and not sum(plan.far_pairs)
    plan = TreePlan(torch.cat([x, x[:1] + 1]), x, 20)  # the depth is bounded, and so is the number of cells
    assert plan.n_near == 3000**2 and plan.n_cells < 200


@pytest.mark.slow
def test_a_cluster_is_resolved_at_any_place():
    torch.manual_seed(13)
    x = torch.cat([rand(2000, 3) * 1e-6 + 0.3, rand(3, 3)])
    plan = TreePlan(x, x, 20)
    assert len(plan.split) > 20 and plan.n_near < 0.3 * 2000**2  # deeper than one word of a code
    kernel = KERNELS["1/r"]
    got, want = whole(plan, FarField(plan, kernel, 1e-6), x, x, rand(2003, 1), kernel)
    assert error(got, want) < 1e-6


def test_codes_order_points_like_their_cells():
    torch.manual_seed(14)
    for dim in (1, 2, 3):
        at = torch.randint(1 << 20, (200, dim))
        want = [
            sum((int(a) >> bit & 1) << (bit * dim + k) for k, a in enumerate(row) for bit in range(20))
            for row in at.tolist()
        ]
        assert cells._interleaved(at).tolist() == want


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_work_is_linear(dim):
    torch.manual_seed(15)
    for name in ("uniform", "clustered"):
        per = []
        for n in (4000, 4000 * 2 ** (2 * dim if dim > 1 else 4)):
            plan = TreePlan(cloud(name, n, dim), cloud(name, n, dim), 40)
            per.append([plan.n_near / n, plan.n_far / n, plan.n_cells / n])
        assert all(b < 2.5 * a + 0.01 for a, b in zip(*per, strict=True))


# Cost and errors --------------------------------------------------------------------------------------------


def test_estimates_grow_with_what_is_asked():
    first, again = balance.estimate(10**6, 10**6, 3, 1e-4, 4e9)
    assert 0 < again < first < 60
    assert balance.estimate(10**6, 10**6, 3, 1e-8, 4e9)[0] > 2 * first
    assert 4 < balance.estimate(10**7, 10**7, 3, 1e-4, 4e9)[1] / again < 25
    assert balance.estimate(0, 10, 3, 1e-4, 4e9) == (0.0, 0.0)
    assert [balance.leaf_for(1e-8, d) > balance.leaf_for(1e-2, d) for d in (1, 2, 3)] == [False, False, True]


def test_errors():
    x = rand(500, 2)
    with pytest.raises(ShapeError, match=r"D = 1, 2 or 3; got \(500, 4\)"):
        TreePlan(rand(500, 4), rand(500, 4), 20)
    with pytest.raises(ShapeError, match=r"y must have shape .* got \(5, 3\)"):
        TreePlan(x, rand(5, 3), 20)
    with pytest.raises(DtypeError, match=r"must be float32 or float64; got torch\.float16"):
        TreePlan(x.half(), x.half(), 20)
    with pytest.raises(ArgumentError, match="y holds values that are not finite"):
        TreePlan(x, x * math.inf, 20)
    with pytest.raises(ArgumentError, match="leaf must be >= 1; got 0"):
        TreePlan(x, x, 0)
    plan = TreePlan(x, x, 16)
    with pytest.raises(ArgumentError, match=r"too rough for a tolerance of 1\.0e-06; use the exact sum"):
        FarField(plan, lambda d: torch.cos(1e4 * norm(d)), 1e-6)
    with pytest.raises(ArgumentError, match="not finite away from x = y"):
        FarField(plan, lambda d: (norm(d) - 0.5).log(), 1e-6)
    with pytest.raises(ShapeError, match=r"weights must have shape \(500, w\); got \(3, 1\)"):
        FarField(plan, norm, 1e-3).apply(rand(3, 1))

"""Compiled reductions against their definitions, evaluated densely in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pullback.kernels.ir.expr import PARAMETER, Expr, I, J, builders, const, index, variable, walk
from pullback.kernels.ir.primitives import PRIMITIVES, op
from pullback.kernels.ir.reductions import KEPT, OVER_BOTH, OVER_I, OVER_J, Program, pullback
from pullback.kernels.ir.structure import STRUCTURES
from pullback.kernels.plan.ranges import Ranges
from pullback.kernels.plan.schedule import layout_of
from pullback.kernels.reduce import Reducer
from pullback.kernels.runtime import compile
from pullback.kernels.runtime.launch import describe, run, supports

ULP = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def evaluate(e: Expr, args, m, n, dtype=torch.float64):
    """e for all pairs: (*batch, m, n, dim)."""
    done = {}
    for v in walk(e):
        if v.op == "Var":
            t = args[v.params[0]].to(dtype)
            category = v.params[1]
            done[v] = (
                t[..., :, None, :] if category == I else t[..., None, :, :] if category == J else t[..., None, None, :]
            )
        elif v.op == "Const":
            done[v] = torch.tensor(v.params, dtype=dtype)
        elif v.op == "Index":
            r = torch.arange(m if v.params[0] == I else n, dtype=dtype)
            done[v] = r[:, None, None] if v.params[0] == I else r[None, :, None]
        else:
            row = PRIMITIVES.get(v.op)
            parts = [done[a] for a in v.args]
            done[v] = row.torch(*parts, *v.params) if row else STRUCTURES[v.op].torch(parts, v.params)
    return done[e]


def definition(p: Program, args, batch, m, n, mask=None):
    """The reduction of dense formulas; mask (m, n) says which pairs count."""
    args = [a.double() for a in args]
    f = [evaluate(e, args, m, n).expand(*batch, m, n, e.dim) for e in p.exprs]
    on = torch.ones(m, n, dtype=torch.bool) if mask is None else mask
    on = on[..., None]
    results = []
    if p.kind == "Sum":
        for x, axis in zip(f, p.axes, strict=True):
            dims = {OVER_J: (-2,), OVER_I: (-3,), OVER_BOTH: (-3, -2)}[axis]
            results.append(torch.where(on, x, 0).sum(dims))
        if len(results) == 1:
            return results[0]
        return torch.cat([r.reshape(*batch, math.prod(r.shape[len(batch) :])) for r in results], -1)
    dim = -2 if p.axes[0] == OVER_J else -3
    if p.kind == "Prod":
        return torch.where(on, f[0], 1).prod(dim)
    if p.kind in ("ArgKMin", "ArgKMax"):
        sign = 1 if p.kind == "ArgKMin" else -1
        x = torch.where(on, (sign * f[0]).nan_to_num(math.inf, math.inf, -math.inf), math.inf)
        order = x.argsort(dim=dim, stable=True).movedim(dim, -1)  # (*batch, rows, dim, N)
        count = order.shape[-1]
        order = torch.nn.functional.pad(order[..., : p.k], (0, max(p.k - count, 0)), value=-1)
        return order.movedim(-1, -2).reshape(*order.shape[:-2], p.k * order.shape[-2])
    weight = f[1] if len(f) > 1 else torch.ones(1, dtype=torch.float64)
    x = torch.where(on, f[0], -math.inf)
    top = x.amax(dim, keepdim=True) if x.shape[dim] else x.new_zeros(())
    top = torch.where(top.isinf(), 0, top)
    e = torch.exp(x - top)
    log = (e.sum(dim)).log() + top.squeeze(dim) if x.shape[dim] else x.sum(dim) - math.inf
    if p.kind == "LogSumExp":
        return (e * weight).sum(dim).log() + (top.squeeze(dim) if x.shape[dim] else 0)
    total = e.sum(dim)
    mean = torch.where(total == 0, 0, (e * weight).sum(dim) / total)
    return torch.cat([log, mean], -1)


def x_(d=3, at=0):
    return variable(at, d, I)


def y_(d=3, at=1):
    return variable(at, d, J)


def sqdist(a, b):
    return builders["Sum"](op("Square", a - b))


def gaussian(d=3):
    return op("Exp", -sqdist(x_(d), y_(d)))


B = variable(2, 1, J)
S3 = ((3, I), (3, J), (1, J))
PROGRAMS = {
    "sum": Program("Sum", (gaussian() * B,), (OVER_J,), S3),
    "sum_vector": Program("Sum", (gaussian() * (x_() - y_()),), (OVER_J,), S3),
    "sum_over_i": Program("Sum", (gaussian() * x_(),), (OVER_I,), S3),
    "sum_both": Program("Sum", (gaussian() * B,), (OVER_BOTH,), S3),
    "sum_of_rows": Program("Sum", (op("Exp", x_()),), (OVER_J,), S3),
    "sum_parameter": Program(
        "Sum", (op("Exp", -variable(3, 1, PARAMETER) * sqdist(x_(), y_())) * B,), (OVER_J,), (*S3, (1, PARAMETER))
    ),
    "sum_index": Program("Sum", (op("LessThan", index(I), index(J)) * B,), (OVER_J,), S3),
    "sum_rolled": Program("Sum", (gaussian(40) * variable(2, 1, J),), (OVER_J,), ((40, I), (40, J), (1, J))),
    "sum_scalar_product": Program(
        "Sum", (op("Exp", builders["Sum"](x_(17) * y_(17)) * 0.1) * B,), (OVER_J,), ((17, I), (17, J), (1, J))
    ),
    "sum_wide": Program("Sum", (gaussian() * variable(2, 20, J),), (OVER_J,), ((3, I), (3, J), (20, J))),
    "sum_wide_over_i": Program("Sum", (gaussian() * variable(2, 20, I),), (OVER_I,), ((3, I), (3, J), (20, I))),
    "sum_nested": Program(
        "Sum",
        (builders["Sum"]((x_(15) - y_(15)) * op("Rsqrt", 1 + sqdist(x_(15), y_(15))) * x_(15)),),
        (OVER_J,),
        ((15, I), (15, J)),
    ),
    "sum_double": Program("Sum", (gaussian() * B,), (OVER_J,), S3, accumulator="float64"),
    "sum_float": Program("Sum", (gaussian() * B,), (OVER_J,), S3, accumulator="float32"),
    "sum_direct": Program("Sum", (gaussian() * B,), (OVER_J,), S3, scheme="direct_sum"),
    "sum_kahan": Program("Sum", (gaussian() * B,), (OVER_J,), S3, scheme="kahan_scheme"),
    "logsumexp": Program("LogSumExp", (5 * sqdist(x_(), y_()) + B,), (OVER_J,), S3),
    "logsumexp_over_i": Program("LogSumExp", (5 * sqdist(x_(), y_()),), (OVER_I,), S3),
    "logsumexp_weight": Program("LogSumExp", (sqdist(x_(), y_()), op("Exp", x_() - y_())), (OVER_J,), S3),
    "logsumexp_direct": Program("LogSumExp", (5 * sqdist(x_(), y_()),), (OVER_J,), S3, scheme="direct_sum"),
    "logsumexp_double": Program("LogSumExp", (5 * sqdist(x_(), y_()),), (OVER_J,), S3, accumulator="float64"),
    "softmax": Program("SoftMax", (-sqdist(x_(), y_()), y_()), (OVER_J,), S3),
    "softmax_wide": Program("SoftMax", (-sqdist(x_(), y_()), variable(2, 20, J)), (OVER_J,), ((3, I), (3, J), (20, J))),
    "prod": Program("Prod", (1 + 0.01 * (x_() - y_()),), (OVER_J,), S3),
    "argmin": Program("ArgKMin", (sqdist(x_(), y_()),), (OVER_J,), S3),
    "argmin_vector": Program("ArgKMin", (op("Square", x_() - y_()),), (OVER_J,), S3),
    "argmax": Program("ArgKMax", (sqdist(x_(), y_()),), (OVER_I,), S3),
    "argkmin": Program("ArgKMin", (sqdist(x_(), y_()),), (OVER_J,), S3, k=5),
    "argkmax_vector": Program("ArgKMax", (x_() - y_() * y_(),), (OVER_I,), S3, k=3),
    "gradients": pullback(
        Program(
            "Sum", (op("Exp", -variable(3, 1, PARAMETER) * sqdist(x_(), y_())) * B,), (OVER_J,), (*S3, (1, PARAMETER))
        ),
        (0, 1, 2, 3),
    )[0],
    "gradients_rolled": pullback(
        Program("Sum", (gaussian(20) * variable(2, 1, J),), (OVER_J,), ((20, I), (20, J), (1, J))), (0, 1, 2)
    )[0],
    "gradients_logsumexp": pullback(Program("LogSumExp", (sqdist(x_(), y_()) + B,), (OVER_J,), S3), (0, 1, 2))[0],
}


def second(d):
    """Gradients of gradients: every kind of result in one pass, long vectors joined and parted again."""
    p = Program("Sum", (gaussian(d) * B,), (OVER_J,), ((d, I), (d, J), (1, J)))
    p, _ = pullback(p, (0, 1))
    return pullback(p, tuple(range(p.n)))[0]


def long(f):
    return Program("Sum", (f,), (OVER_J,), ((30, I), (30, J)))


X30, Y30 = x_(30), y_(30)
PROGRAMS |= {
    "second": second(3),
    "second_rolled": second(16),
    "long_parts": long(builders["Concat"](X30, Y30 * X30, x_(30) - y_(30))),
    "long_slice": long(builders["Gather"](X30 * Y30, tuple(range(5, 25)))),
    "long_sum_of_parts": long(
        builders["Sum"](
            op("Square", builders["Concat"](X30, Y30) - builders["Concat"](Y30, builders["SumT"](const(1), 30)))
        )
    ),
    "long_scatter": long(builders["Scatter"](op("Exp", -X30 * Y30), tuple(range(7, 37)), 50)),
    "long_gather": long(builders["Gather"](X30 * Y30, tuple(range(29, 5, -2)))),
    "long_maximum": long(builders["Max"](X30 - Y30)),
    "prod_wide": Program("Prod", (1 + 0.01 * (x_(14) - y_(14)),), (OVER_J,), ((14, I), (14, J))),
    "argmin_wide": Program("ArgKMin", (op("Square", x_(14) - y_(14)),), (OVER_I,), ((14, I), (14, J))),
    "argkmax_wide": Program("ArgKMax", (x_(6) - y_(6) * x_(6),), (OVER_J,), ((6, I), (6, J)), k=3),
    "matrix_vector": Program(
        "Sum",
        (builders["TensorDot"](variable(0, 12, I), y_(4), (3, 4), (4,), (1,), (0,), ()),),
        (OVER_J,),
        ((12, I), (4, J)),
    ),
}


def data(p: Program, batch, m, n, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = {I: (m,), J: (n,), PARAMETER: ()}
    scale = 1.0 if max(d for d, _ in p.signature) < 12 else 0.3
    return [
        (scale * torch.rand(*batch, *rows[c], d, generator=g, dtype=torch.float64)).to(dtype) for d, c in p.signature
    ]


def close(p: Program, got, want, dtype, loose=1.0):
    assert got.shape == want.shape
    if p.kind.startswith("Arg"):
        assert got.dtype == torch.int64
        if dtype == torch.float64:
            assert torch.equal(got, want)
        else:  # nearly equal terms may change places
            assert ((got == want).double().mean() > 0.95) or got.numel() == 0
        return
    assert got.dtype == dtype
    finite = want[want.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    torch.testing.assert_close(
        got.double(), want, rtol=loose * ULP[dtype], atol=loose * ULP[dtype] * scale, equal_nan=True
    )


SIZES = [(1, 1), (7, 33), (33, 7), (64, 300), (1, 1000), (1000, 3)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_definition(name):
    p = PROGRAMS[name]
    assert supports(p, torch.float32)
    for dtype in (torch.float64, torch.float32):
        for m, n in SIZES:
            args = data(p, (), m, n, dtype)
            close(p, run(p, args, (), m, n), definition(p, args, (), m, n), dtype)


@pytest.mark.parametrize("name", [k for k in PROGRAMS if k != "matrix_vector"])  # its torch form knows no empty tensors
def test_empty(name):
    p = PROGRAMS[name]
    for m, n, batch in ((0, 5, ()), (5, 0, ()), (0, 0, ()), (3, 4, (0,))):
        args = data(p, batch, m, n, torch.float32)
        close(p, run(p, args, batch, m, n), definition(p, args, batch, m, n), torch.float32)


@pytest.mark.parametrize(
    "name", ["sum", "sum_both", "sum_parameter", "sum_rolled", "logsumexp", "softmax", "argkmin", "gradients"]
)
def test_batch(name):
    """Any leading axes, missing or broadcast; any strides."""
    p = PROGRAMS[name]
    batch, m, n = (2, 3), 9, 21
    for dtype in (torch.float64, torch.float32):
        for lead in (((2, 3),) * 8, ((3,), (2, 1), (), (1, 3)) * 2):
            args = []
            for k, t in enumerate(data(p, batch, m, n, dtype)):
                extra = tuple(slice(0, 1) if a == 1 else slice(None) for a in ((1, 1), *lead)[k + 1][-2:])
                t = t[(0,) * (2 - len(lead[k]))][extra] if len(lead[k]) < 2 else t[extra]
                args.append(t)
            want = definition(p, args, batch, m, n)
            close(p, run(p, args, batch, m, n), want, dtype)
            strided = [
                torch.stack([t, t], -1).transpose(-2, -3).contiguous().transpose(-2, -3)[..., 0] if t.ndim > 1 else t
                for t in args
            ]
            close(p, run(p, strided, batch, m, n), want, dtype)


def test_expanded_rows():
    """Stride 0: one row for all."""
    p = PROGRAMS["sum"]
    x, y, b = data(p, (), 40, 50, torch.float64)
    args = [x[:1].expand(40, 3), y, b[:1, :1].expand(50, 1)]
    close(p, run(p, args, (), 40, 50), definition(p, args, (), 40, 50), torch.float64)


def test_negative_views():
    """The imaginary part of a conjugate is a view of memory that holds the opposite sign."""
    p = PROGRAMS["sum"]
    x, y, b = data(p, (), 20, 30, torch.float64)
    z = torch.complex(b, b).conj().imag
    assert z.is_neg()
    close(p, run(p, [x, y, z], (), 20, 30), definition(p, [x, y, -b], (), 20, 30), torch.float64)


def ranges_of(m, n, seed=0):
    """Rows in blocks, some left out, with random spans of columns; and the mask of pairs for each axis."""
    g = torch.Generator().manual_seed(seed)

    def half(rows, columns):
        cuts = sorted({0, rows, *torch.randint(0, rows, (5,), generator=g).tolist()})
        blocks, ends, spans, mask = [], [], [], torch.zeros(rows, columns, dtype=torch.bool)
        for k, (a, b) in enumerate(itertools.pairwise(cuts)):
            if k == 2:
                continue
            blocks.append((a, b))
            at = 0
            for _ in range(k % 3):
                lo = at + int(torch.randint(0, 10, (1,), generator=g))
                hi = min(lo + int(torch.randint(1, 60, (1,), generator=g)), columns)
                if lo < hi:
                    spans.append((lo, hi))
                    mask[a:b, lo:hi] = True
                    at = hi
            ends.append(len(spans))
        return [torch.tensor(blocks).reshape(-1, 2), torch.tensor(ends), torch.tensor(spans).reshape(-1, 2)], mask

    first, mask = half(m, n)
    second, other = half(n, m)
    return Ranges(*first, *second), mask, other.T


@pytest.mark.parametrize("name", [k for k in PROGRAMS if not k.startswith(("argk", "argm"))])
def test_ranges(name):
    p = PROGRAMS[name]
    m, n = 300, 200
    ranges, rows, columns = ranges_of(m, n)
    mask = columns if set(p.axes) == {OVER_I} else rows
    for batch in ((), (2,)):
        args = data(p, batch, m, n, torch.float64)
        close(p, run(p, args, batch, m, n, ranges), definition(p, args, batch, m, n, mask), torch.float64)


def test_ranges_of_indices():
    """Only pairs of the pattern are candidates; places that nothing fills are -1."""
    p = PROGRAMS["argkmin"]
    ranges, mask, _ = ranges_of(300, 200)
    args = data(p, (), 300, 200, torch.float64)
    want = definition(p, args, (), 300, 200, mask)
    want[torch.arange(5) >= mask.sum(1, keepdim=True)] = -1
    assert torch.equal(run(p, args, (), 300, 200, ranges), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    for name in ("sum", "logsumexp", "gradients"):
        p = PROGRAMS[name]
        args = data(p, (), 30, 40, dtype)
        close(p, run(p, args, (), 30, 40), definition(p, args, (), 30, 40), dtype)


SPECIAL = {
    "-inf": [-math.inf] * 6,
    "inf": [0.0, math.inf, 1.0, -math.inf, 2.0, 0.0],
    "nan": [0.0, 1.0, math.nan, 3.0, -math.inf, 1.0],
    "large": [1e30, -1e30, 3.0, 1e30, -math.inf, 2.0],
    "slowly rising": [10.0 * k for k in range(40)],
    "rising": [-1e4, -100.0, 0.0, 100.0, 1e4, 1e4],
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logsumexp_special(name, dtype):
    """As torch.logsumexp, also along the lanes and across tiles."""
    p = Program("LogSumExp", (variable(0, 1, J) + 0 * variable(1, 1, I),), (OVER_J,), ((1, J), (1, I)))
    for m, copies in ((1, 1), (40, 1), (1, 200), (40, 200)):
        f = torch.tensor(SPECIAL[name] * copies, dtype=dtype)
        got = run(p, [f[:, None], torch.zeros(m, 1, dtype=dtype)], (), m, len(f))
        want = torch.logsumexp(f, 0).expand(m, 1)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("kind", ["ArgKMin", "ArgKMax"])
def test_indices_special(kind, k):
    """The first index wins ties; nan and the worst infinity come last; -1 where there is nothing left."""
    p = Program(kind, (variable(0, 1, J) + 0 * variable(1, 1, I),), (OVER_J,), ((1, J), (1, I)), k=k)
    worst = math.inf if kind == "ArgKMin" else -math.inf
    for values in ([1.0, 0.0, 1.0, 0.0], [worst] * 5, [math.nan, 2.0, math.nan], [worst, 1.0, math.nan], [5.0] * 300):
        for m in (1, 40):
            f = torch.tensor(values)[:, None]
            args = [f, torch.zeros(m, 1)]
            got = run(p, args, (), m, len(values))
            assert torch.equal(got, definition(p, args, (), m, len(values)))


def test_index_is_exact():
    """Indices beyond 2^24, where float32 has holes."""
    n = (1 << 24) + 40
    y = torch.zeros(n, 1)
    y[n - 3] = -1
    p = Program("ArgKMin", (variable(0, 1, J) + variable(1, 1, I),), (OVER_J,), ((1, J), (1, I)))
    assert run(p, [y, torch.zeros(1, 1)], (), 1, n).item() == n - 3
    assert run(p, [y, torch.zeros(20, 1)], (), 20, n)[:, 0].tolist() == [n - 3] * 20


def test_softmax_weights_of_large_exponents_agree_with_the_forward_pass():
    """The weight exp(f - log sum exp f) of a single term is 1, however large f is."""
    f = variable(0, 1, I) * variable(1, 1, J)
    reducer = Reducer("LogSumExp", f, ((1, I), (1, J)), 1)
    x, y = (torch.full((40, 1), v, requires_grad=True) for v in (31.4159, 32.7182))
    total = reducer((x, y[:1]))
    (slope,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(slope, torch.full_like(x, 32.7182), rtol=2e-7, atol=0)


@pytest.mark.slow
def test_accuracy():
    """At most 1e-6 relative in float32 for 10^4 positive weights, also shifted by 1000 (exactly, in float32)."""
    g = torch.Generator().manual_seed(0)
    for d in (3, 50):
        p = Program("Sum", (op("Exp", -sqdist(x_(d), y_(d)) / d) * B,), (OVER_J,), ((d, I), (d, J), (1, J)))
        x, y = (torch.randint(0, 1 << 12, (k, d), generator=g) / 2**12 for k in (200, 10_000))
        b = torch.rand(10_000, 1, generator=g)
        want = definition(p, [x, y, b], (), 200, 10_000)
        for shift in (0, 1000):
            got = run(p, [x + shift, y + shift, b], (), 200, 10_000).double()
            assert ((got - want) / want).abs().max() < 1e-6


@pytest.mark.parametrize("row", [k for k in PRIMITIVES])
def test_rows(row):
    """Every row of the table, packed and for pairs."""
    r = PRIMITIVES[row]
    dims = [1] * r.arity
    for roles in ([I] * r.arity, [I if k % 2 else J for k in range(r.arity)]):
        v = [variable(k, d, c) for k, (d, c) in enumerate(zip(dims, roles, strict=True))]
        e = op(row, *v, *r.params) + 0 * variable(r.arity, 1, J)
        p = Program("Sum", (e,), (OVER_J,), (*((1, c) for c in roles), (1, J)))
        g = torch.Generator().manual_seed(1)
        for dtype in (torch.float32, torch.float64):
            if not supports(p, dtype):
                pytest.skip(f"no code for {row}")
            args = [
                (lo + (hi - lo) * torch.rand(7 if c == I else 5, 1, generator=g, dtype=dtype))
                for (lo, hi), c in zip(r.sample, roles, strict=True)
            ] + [torch.zeros(5, 1, dtype=dtype)]
            loose = 1e5 if row == "Trigamma" else 1  # torch's own is accurate to about 1e-9
            close(p, run(p, args, (), 7, 5), definition(p, args, (), 7, 5), dtype, loose)


@pytest.mark.parametrize("target", ["x86-64", "haswell", "skylake-avx512"])
def test_targets(target):
    """Machines without AVX-512 or FMA give the same to the same tolerance."""
    if not compile.runs_here(target):
        pytest.skip(f"this CPU has not what {target} has")
    with compile.use_target(target):
        for name in (
            "sum",
            "sum_vector",
            "sum_both",
            "sum_rolled",
            "sum_wide_over_i",
            "logsumexp",
            "softmax",
            "argmin",
            "argmax",
            "argkmin",
            "gradients",
            "gradients_rolled",
        ):
            p = PROGRAMS[name]
            for dtype in (torch.float32, torch.float64):
                for m, n in ((1, 100), (33, 70)):
                    args = data(p, (), m, n, dtype)
                    close(p, run(p, args, (), m, n), definition(p, args, (), m, n), dtype)


def test_describe():
    text = describe(PROGRAMS["sum"], torch.float32, 1000, 1000)
    assert "define void @worker" in text
    loop = text.split("assembly of the inner loop")[1]
    assert len(loop.splitlines()) > 10


def test_long_vectors_stay_loops():
    """The code for a vector of 5000 components is as short as that for 50."""
    counts = []
    for d in (50, 5000):
        p = Program("Sum", (gaussian(d) * (x_(d) - y_(d)),), (OVER_J,), ((d, I), (d, J)))
        p, _ = pullback(p, (0, 1))
        assert supports(p, torch.float32)
        counts.append(len(layout_of(p).pairs))
    assert counts[0] == counts[1] < 30


def test_unsupported():
    """What has no code says so, and is left to the eager renderer."""
    assert not supports(PROGRAMS["sum"], torch.int64)
    long = Program("Prod", (x_(50) - y_(50),), (OVER_J,), ((50, I), (50, J)))
    assert not supports(long, torch.float32)
    assert KEPT[OVER_J] == I and const(1).dim == 1

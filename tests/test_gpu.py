"""Reductions where the tensors lie: on a CUDA device, with `pytest -m gpu`, and, by the same functions, on the CPU.

Numbers are compared with definitions in float64 on the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings

import pytest
import torch
from test_kernels_llvm import PROGRAMS, ULP, close, data, definition, ranges_of
from test_kernels_triton import row_program

import pullback as pb
from pullback.kernels import task as tasks
from pullback.kernels.codegen.triton import LARGEST_K
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.reductions import OVER_I
from pullback.kernels.runtime import gpu
from pullback.kernels.task import BackendWarning, task

CUDA = torch.cuda.is_available()
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device; torch sees none")]
LOOSE = 4.0  # times the tolerances of the CPU, whose exp is exact to 2 ulp and not to the 4 of a GPU
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=[pytest.param("cuda", marks=needs_cuda), "cpu"])
def device(request):
    return torch.device(request.param)


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def evaluated(p, args, batch, m, n, device, ranges=None, backend="auto"):
    return task(p, ranges, backend).evaluate([a.to(device) for a in args]).cpu()


# The engine -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name, device):
    p = PROGRAMS[name]
    for (m, n), dtype in itertools.product([(1, 1), (70, 130), (1, 1000), (1000, 3)], (torch.float64, torch.float32)):
        args = data(p, (), m, n, dtype)
        close(p, evaluated(p, args, (), m, n, device), definition(p, args, (), m, n), dtype, LOOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sum", "sum_wide", "logsumexp", "softmax", "argkmin", "gradients"])
def test_half(name, dtype, device):
    p = PROGRAMS[name]
    args = data(p, (), 70, 130, dtype)
    got = evaluated(p, args, (), 70, 130, device)
    if name == "argkmin":  # ties are many: the values at the chosen pairs are compared
        square = torch.cdist(args[0].double(), args[1].double()).square()
        nearest = square.topk(5, largest=False).values
        torch.testing.assert_close(square.gather(1, got), nearest, rtol=ULP[dtype], atol=4 * ULP[dtype])
        return
    close(p, got, definition(p, args, (), 70, 130), dtype, LOOSE)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_rows(name, device):
    """Every operation, compiled where it has code and tile by tile otherwise."""
    p = row_program(name)
    low, high = zip(*PRIMITIVES[name].sample, strict=True)
    for dtype in (torch.float64, torch.float32):
        numbers = data(p, (), 33, 65, torch.float64)
        args = [(lo + (hi - lo) * a).to(dtype) for a, lo, hi in zip(numbers, low, high, strict=True)]
        _, m, n = tasks.sizes(p.signature, args)
        got = evaluated(p, args, (), m, n, device)
        want = definition(p, args, (), m, n)
        rtol = 3e-5 if dtype == torch.float32 else 1e-8 if "amma" in name else 1e-11  # torch's own, for these
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * float(want.abs().max()))


@pytest.mark.parametrize(
    "name", ["sum", "sum_both", "sum_parameter", "sum_rolled", "logsumexp", "softmax", "gradients"]
)
def test_batches_and_strides(name, device):
    p = PROGRAMS[name]
    batch, m, n = (2, 3), 9, 21
    for dtype in (torch.float64, torch.float32):
        args = data(p, batch, m, n, dtype)
        want = definition(p, args, batch, m, n)
        close(p, evaluated(p, args, batch, m, n, device), want, dtype, LOOSE)
        strided = [
            torch.stack([t, t], -1).to(device)[..., 0].transpose(0, 1).contiguous().transpose(0, 1) for t in args
        ]
        close(p, evaluated(p, strided, batch, m, n, device), want, dtype, LOOSE)
        args[0], args[1] = args[0][:1], args[1][1]
        close(p, evaluated(p, args, batch, m, n, device), definition(p, args, batch, m, n), dtype, LOOSE)


@pytest.mark.parametrize("name", ["sum", "sum_over_i", "sum_rolled", "logsumexp", "softmax", "prod", "gradients"])
def test_block_sparse(name, device):
    p = PROGRAMS[name]
    m, n = 300, 200
    ranges, rows, columns = ranges_of(m, n)
    for batch in ((), (2,)):
        args = data(p, batch, m, n, torch.float64)
        want = definition(p, args, batch, m, n, columns if set(p.axes) == {OVER_I} else rows)
        close(p, evaluated(p, args, batch, m, n, device, ranges), want, torch.float64, LOOSE)


@pytest.mark.parametrize("name", [k for k in PROGRAMS if k != "matrix_vector"])
def test_empty(name, device):
    p = PROGRAMS[name]
    for m, n, batch in ((0, 5, ()), (5, 0, ()), (3, 4, (0,))):
        args = data(p, batch, m, n, torch.float32)
        close(p, evaluated(p, args, batch, m, n, device), definition(p, args, batch, m, n), torch.float32)


@pytest.mark.parametrize(
    "name", ["sum", "sum_index", "logsumexp_weight", "softmax", "argkmin", "gradients", "long_gather"]
)
def test_tiles_in_torch(name, device):
    """The eager back end on the device."""
    p = PROGRAMS[name]
    args = data(p, (), 70, 130, torch.float64)
    got = evaluated(p, args, (), 70, 130, device, backend="eager")
    close(p, got, definition(p, args, (), 70, 130), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("place", [pytest.param("cuda", marks=needs_cuda)])
def test_triton_is_taken(place, monkeypatch):
    """Not the eager back end: that would say so, and "triton" insists."""
    monkeypatch.setattr(tasks, "_said", set())
    for name, dtype in itertools.product(PROGRAMS, DTYPES):
        p = PROGRAMS[name]
        if not gpu.why_not(p, dtype):
            args = [a.to(place) for a in data(p, (), 70, 130, dtype)]
            got, want = task(p).evaluate(args), task(p, None, "triton").evaluate(args)
            torch.testing.assert_close(got, want, equal_nan=True)


# What users call --------------------------------------------------------------------------------------------------

M, N = 61, 83
ALIASES = ["x = Vi(3)", "y = Vj(3)", "b = Vj(2)", "p = Pm(1)"]
FORMULAS = {
    "Sum": ("Exp(-p * SqDist(x, y)) * b", {}),
    "LogSumExp": ("-p * SqDist(x, y) + Elem(b, 0)", {}),
    "LogSumExpWeight": ("-p * SqDist(x, y)", {"formula2": "Square(b) + IntCst(1)"}),
    "SumSoftMax": ("-p * SqDist(x, y)", {"formula2": "b"}),
    "Prod": ("IntCst(1) + p * (x - y) * Elem(b, 1) / IntCst(100)", {}),
    "Mean": ("Sqrt(SqDist(x, y) + p) * b", {}),
    "Var": ("Sqrt(SqDist(x, y) + p) * b", {}),
    "Min": ("SqDist(x, y) * p + Elem(b, 0)", {}),
    "KMin": ("SqDist(x, y) * p + Elem(b, 0)", {"opt_arg": 4}),
    "ArgKMin": ("SqDist(x, y) * p + Elem(b, 0)", {"opt_arg": 4}),
    "Max_ArgMax": ("SqDist(x, y) * p + Elem(b, 0)", {}),
}


def arguments(dtype=torch.float64, *batch):
    shapes = ((*batch, M, 3), (N, 3), (*batch, N, 2), (1,))
    return [rand(*s, seed=k) + (0.5 if k == 3 else 0.0) for k, s in enumerate(shapes)]


def genred(kind, **options):
    formula, given = FORMULAS[kind]
    return pb.Genred(formula, ALIASES, kind, axis=1, **given, **options)


def listed(y):
    return list(y) if isinstance(y, tuple) else [y]


def on(device, tensors, dtype=torch.float64):
    return [t.to(device, dtype) for t in tensors]


@pytest.mark.parametrize("kind", FORMULAS)
def test_genred(kind, device):
    """Values, gradients in all arguments, and gradients of gradients."""
    f, args = genred(kind), arguments(torch.float64, 2)

    def all_of(args, backend):
        args = [a.requires_grad_() for a in args]
        found = listed(f(*args, backend=backend))
        floats = [y for y in found if y.is_floating_point()]
        if floats:
            weights = [torch.linspace(1, 2, y.numel(), dtype=torch.float64).reshape(y.shape).to(y) for y in floats]
            loss = sum((y * w).sum() for y, w in zip(floats, weights, strict=True))
            first = torch.autograd.grad(loss, args, create_graph=True, allow_unused=True)
            first = [g for g in first if g is not None]
            found += first
            again = [g for g in first if g.requires_grad]
            if again:
                second = torch.autograd.grad(sum(g.sin().sum() for g in again), args, allow_unused=True)
                found += [g for g in second if g is not None]
        return [y.detach().cpu() for y in found]

    got, want = all_of(on(device, args), "auto"), all_of(on("cpu", args), "eager")
    assert len(got) == len(want) > 0
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["Sum", "LogSumExp", "SumSoftMax", "Mean"])
def test_genred_in_single_precision(kind, device):
    f, args = genred(kind), arguments()
    want = f(*args, backend="eager")
    got = f(*on(device, args, torch.float32))
    assert got.dtype == torch.float32 and got.device.type == device.type
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-5, atol=2e-5)


def test_lazy_tensors(device):
    x, y, b, p = arguments()

    def all_of(place):
        u, v, w, q = on(place, (x, y, b, p))
        d = pb.Vi(u).sqdist(pb.Vj(v)) * pb.Pm(q)
        K = (-d).exp()
        z = pb.Vj(torch.complex(w, w.flip(0)))
        found = [
            *(
                K.sum(1),
                K.sum(0),
                K @ w,
                K.T @ u,
                K.logsumexp(1),
                (-d).logsumexp(0),
                (-d).sumsoftmaxweight(pb.Vj(w), 1),
            ),
            *(d.min(1), d.argmin(1), d.Kmin(3, 1), d.argKmin(3, 0), K.mean(1), K.var(1), (1 + K / 50).prod(1)),
            *((K * z).sum(1), (K * (K.i < K.j)).sum(1), (d < 0.5).sum(1)),
        ]
        return [t.cpu() for t in found]

    for got, want in zip(all_of(device), all_of("cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_gradcheck_and_forward_mode(device):
    f = genred("Sum")
    args = [a[:7] if a.ndim > 1 else a for a in on(device, arguments())]
    args = [a.requires_grad_() for a in args]
    assert torch.autograd.gradcheck(f, args, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, args, fast_mode=True)
    tangents = [torch.cos(a.detach()) for a in args]
    _, got = torch.func.jvp(f, tuple(a.detach() for a in args), tuple(tangents))
    _, want = torch.func.jvp(f, tuple(a.detach().cpu() for a in args), tuple(t.cpu() for t in tangents))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-11, atol=1e-11)


def test_vmap(device):
    f = genred("Sum")
    x, y, b, p = on(device, arguments())
    stack = torch.stack([b, 2 * b, b.flip(0)])
    got = torch.func.vmap(lambda v: f(x, y, v, p))(stack)
    torch.testing.assert_close(got, torch.stack([f(x, y, v, p) for v in stack]), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled(device):
    f = genred("LogSumExp")
    args = [a.requires_grad_() for a in on(device, arguments())]
    torch._dynamo.reset()
    call = torch.compile(lambda *a: f(*a).sin() * 2, fullgraph=True, backend="aot_eager")
    got, want = call(*args), f(*args).sin() * 2
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(z.square().sum(), args) for z in (got, want))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(4))
def test_operators_pass_the_conformance_kit(k, device):
    op = list(pb.KernelOperator.examples())[k].to(device)
    pb.check(op, rtol=1e-10, compile=False).raise_if_failed()


def test_solve(device):
    x, _, _, _ = arguments()
    b = rand(M, 2, seed=9)
    solve = pb.KernelSolve("Exp(-SqDist(x, y)) * v", ["x = Vi(3)", "y = Vj(3)", "v = Vj(2)"], "v", axis=1)
    u, v = (t.requires_grad_() for t in on(device, (x, b)))
    z = solve(u, u, v, alpha=0.1, eps=1e-12)
    dense = (-torch.cdist(x, x).square()).exp() + 0.1 * torch.eye(M, dtype=torch.float64)
    torch.testing.assert_close(z.detach().cpu(), torch.linalg.solve(dense, b), rtol=1e-7, atol=1e-7)
    (g,) = torch.autograd.grad(z.sum(), v)
    want = torch.linalg.solve(dense, torch.ones(M, 2, dtype=torch.float64))
    torch.testing.assert_close(g.cpu(), want, rtol=1e-6, atol=1e-6)


def test_a_tolerance_is_kept(device):
    """On a device the sum is exact, which is within every tolerance."""
    f, args = genred("Sum"), arguments()
    got = f(*on(device, args), tolerance=1e-4).cpu()
    want = f(*args)
    assert float((got - want).norm() / want.norm()) < 1e-4


# Streams, graphs, devices -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def never_waiting(device):
    """Whatever makes the host wait for the device is an error."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("kind", FORMULAS)
def test_the_host_never_waits(kind, backend, device):
    """A call after the first one, its gradients and theirs."""
    f = genred(kind)
    args = [a.requires_grad_() for a in on(device, arguments(), torch.float32)]

    def call():
        ys = [y for y in listed(f(*args, backend=backend)) if y.is_floating_point()]
        if ys:
            loss = sum(y.sum() for y in ys)
            grads = torch.autograd.grad(loss, args, create_graph=True, allow_unused=True)
            again = [g.sum() for g in grads if g is not None and g.requires_grad]
            return torch.autograd.grad(sum(again), args, allow_unused=True) if again else grads
        return ys

    want = call()
    with never_waiting(device):
        got = call()
    for g, w in zip(got, want, strict=True):
        if g is not None:
            torch.testing.assert_close(g, w)


def test_block_sparse_never_waits(device):
    p = PROGRAMS["sum"]
    ranges, _, _ = ranges_of(300, 200)
    args = [a.to(device) for a in data(p, (), 300, 200, torch.float32)]
    want = task(p, ranges).evaluate(args)
    with never_waiting(device):
        got = task(p, ranges).evaluate(args)
    torch.testing.assert_close(got, want)


def test_the_current_stream(device):
    """Work of a stream comes after what the stream did before, and other streams do not wait for it."""
    f, args = genred("Sum"), on(device, arguments())
    want = f(*args)
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    with torch.cuda.stream(stream):  # None: no change
        late = [torch.zeros_like(a) for a in args]
        if stream is not None:
            stream.wait_stream(torch.cuda.default_stream())
            torch.cuda._sleep(50_000_000)
        for a, b in zip(late, args, strict=True):
            a.copy_(b)
        got = f(*late)
    if stream is not None:
        stream.synchronize()
    torch.testing.assert_close(got, want)


def replayed(device, call):
    """A function that does again what `call` did, from a captured graph on CUDA; call() gives a tensor."""
    if device.type == "cpu":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def again():
        graph.replay()
        return out

    return again


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("kind", ["Sum", "LogSumExp", "SumSoftMax", "KMin", "ArgKMin"])
def test_captured_graphs(kind, backend, device):
    """Captured once and replayed with other numbers in the same memory, forward and gradient."""
    f = genred(kind)
    args = [a.requires_grad_() for a in on(device, arguments())]

    def call():
        y = f(*args, backend=backend)
        return y if not y.is_floating_point() else torch.autograd.grad(y.sum(), args[0])[0]

    again = replayed(device, call)
    for k in (1, 2):
        with torch.no_grad():
            for a in args[:3]:
                a.copy_(rand(*a.shape, seed=10 * k + a.shape[-1]).to(a))
        got = again().clone()
        torch.testing.assert_close(got, call())


@pytest.mark.parametrize(
    "places",
    [
        ("cpu", "cpu"),
        pytest.param(
            ("cuda:0", "cuda:1"),
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
            ],
        ),
    ],
)
def test_work_is_done_where_the_tensors_lie(places):
    """Also on a device that is not the current one."""
    f = genred("Sum")
    want = f(*arguments())
    for place in places:
        args = [a.requires_grad_() for a in on(place, arguments())]
        y = f(*args)
        assert y.device == torch.device(place)
        torch.testing.assert_close(y.detach().cpu(), want, rtol=1e-11, atol=1e-11)
        (g,) = torch.autograd.grad(y.sum(), args[0])
        assert g.device == torch.device(place)
    if CUDA:
        with pytest.raises(pb.DeviceError, match="move them to one device"):
            f(*on(places[0], arguments()[:1]), *on("cuda:1" if len(set(places)) > 1 else "cuda", arguments()[1:]))


# Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "rows"),
    [("cpu", 1000), pytest.param("cuda", (1 << 25) + 3, marks=[*needs_cuda, pytest.mark.slow])],
)
def test_more_elements_than_int32_counts(place, rows):
    """64 x 2^25 elements and more, in an argument and in the result: the last rows are right."""
    dim = 65
    if place == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 4 * rows * dim:
        pytest.skip("needs the memory of three arrays of 2^31 numbers")
    x = torch.arange(rows, device=place, dtype=torch.float32).remainder_(1013)[:, None].repeat(1, dim)
    y = torch.tensor([[1.0], [2.0], [4.0]], device=place)
    f = pb.Genred("x * y", [f"x = Vi({dim})", "y = Vj(1)"], axis=1)
    got = f(x, y)
    for part in (slice(0, 5), slice(rows // 2, rows // 2 + 5), slice(rows - 5, rows)):
        assert torch.equal(got[part], 7 * x[part])
    del got
    over_rows = pb.Genred("x * y", [f"x = Vi({dim})", "y = Vj(1)"], axis=0, dtype_acc="float64")
    torch.testing.assert_close(over_rows(x, y), y * x[:, :1].sum(dtype=torch.float64).float().expand(1, dim))


def test_what_triton_does_not_take(device, monkeypatch):
    """Right all the same, with one word about it on a device."""
    monkeypatch.setattr(tasks, "_said", set())
    x, y = rand(30, 3), rand(200, 3, seed=1)
    f = pb.Genred("SqDist(x, y)", ["x = Vi(3)", "y = Vj(3)"], "ArgKMin", axis=1, opt_arg=LARGEST_K + 1)
    said = pytest.warns(BackendWarning, match="K = ") if device.type == "cuda" else contextlib.nullcontext()
    with said:
        got = f(x.to(device), y.to(device)).cpu()
    assert torch.equal(got, torch.cdist(x, y).argsort(dim=1, stable=True)[:, : LARGEST_K + 1])


def test_many_columns(device):
    """More columns than a tile, and a number of them that no tile divides."""
    x, y, b, p = rand(5, 3), rand(100_003, 3, seed=1), rand(100_003, 2, seed=2), torch.tensor([0.7]).double()
    want = torch.exp(-p * (x[:, None] - y).square().sum(-1)) @ b
    torch.testing.assert_close(genred("Sum")(*on(device, (x, y, b, p))).cpu(), want, rtol=1e-11, atol=1e-9)

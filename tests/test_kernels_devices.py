"""Reductions on devices that are not at hand: which back end runs, what is said, and that the host never waits.

The devices are those of torch's fake tensors, see `devices.py`; the numbers are checked where there is a device, in
`test_gpu.py`.
"""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from devices import HostCopy, pretended
from test_kernels_llvm import PROGRAMS, S3

import pullback as pb
from pullback.kernels import task as tasks
from pullback.kernels.codegen import eager
from pullback.kernels.codegen.triton import LARGEST_K
from pullback.kernels.ir.expr import PARAMETER, I, J, builders, const, variable
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.reductions import OVER_BOTH, OVER_I, OVER_J, REDUCTIONS, Program
from pullback.kernels.ir.structure import STRUCTURES
from pullback.kernels.runtime import gpu
from pullback.kernels.task import BackendWarning, Task, sizes

M, N = 7, 5


def fakes(p, device, dtype=torch.float32, batch=()):
    shapes = [((M,), (N,), ())[c] + (d,) for d, c in p.signature]
    return [torch.empty(*batch, *s, dtype=dtype, device=device) for s in shapes]


def shape_of(p, batch=()):
    rows = {OVER_J: (M,), OVER_I: (N,), OVER_BOTH: ()}
    if len(p.axes) == 1:
        return (*batch, *rows[p.axes[0]], p.widths[0])
    counts = {OVER_J: M, OVER_I: N, OVER_BOTH: 1}
    return (*batch, sum(counts[a] * w for a, w in zip(p.axes, p.widths, strict=True)))


def row_program(name):
    row = PRIMITIVES[name]
    args = [variable(k, 1, (I, J, I)[k]) for k in range(row.arity)]
    e = builders[name](*args, *row.params)
    return Program("Sum", (e,), (OVER_J,), tuple((1, (I, J, I)[k]) for k in range(row.arity)))


@pytest.fixture
def unsaid(monkeypatch):
    """Nothing has been said in this process."""
    monkeypatch.setattr(tasks, "_said", set())


def ranges():
    return pb.kernels.Ranges(
        *[torch.tensor(t) for t in ([[0, 3], [3, 7]], [1, 2], [[0, 2], [1, 5]], [[0, 5]], [1], [[0, 7]])]
    )


# The tiled back end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_tiles_never_wait_for_the_device(name, device):
    """Every kind of reduction, without a number read or copied, with the shape and dtype of its result."""
    p = PROGRAMS[name]
    if device == "mps" and p.accumulator == "float64":
        return  # this device has no float64
    for batch, pattern in (((), None), ((2,), ranges())) if device == "cuda" else (((), None),):
        with pretended():
            args = fakes(p, device, batch=batch)
            y = eager.run(p, args, batch, M, N, pattern)
        assert y.device.type == device and tuple(y.shape) == shape_of(p, batch)
        assert y.dtype == (torch.int64 if REDUCTIONS[p.kind].integer else torch.float32)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_no_row_waits_for_the_device(name):
    p = row_program(name)
    with pretended():
        assert eager.run(p, fakes(p, "cuda"), (), M, N).shape == (M, 1)


def test_constants_are_made_on_the_device():
    e = variable(0, 3, I) * const(1.0, 2.0, 3.0) + variable(1, 3, J) * const(2.0, 2.0, 2.0)
    p = Program("Sum", (e,), (OVER_J,), ((3, I), (3, J)))
    with pretended():
        assert eager.run(p, fakes(p, "cuda"), (), M, N).shape == (M, 3)
        with pytest.raises(HostCopy, match="copies between cpu and cuda"):
            torch.tensor([1.0, 2.0], device="cuda")


def test_what_devices_do_instead_of_lists_gives_the_same_numbers():
    for values in ((1.0, 2.0, 3.0), (2.0, 2.0), (0.5,)):
        assert eager.filled(values, torch.empty(0)).tolist() == list(values)
    t = torch.rand(2, M, 1, 4)
    for e in (
        builders["Gather"](variable(0, 4, I), (2, 0, 2)),
        builders["Gather"](variable(0, 4, I), (1, 2)),
        builders["Scatter"](variable(0, 4, I), (5, 0, 5, 1), 7),
    ):
        assert torch.equal(eager.by_columns(e, [t]), STRUCTURES[e.op].torch([t], e.params))


def test_values_at_chosen_pairs_never_wait_for_the_device():
    with pretended():
        args = fakes(PROGRAMS["sum"], "cuda")
        chosen = torch.empty(M, 4, 1, dtype=torch.int64, device="cuda")
        y = eager.selected(PROGRAMS["sum"].exprs[0], args, PROGRAMS["sum"].signature, I, chosen)
    assert y.shape == (M, 4, 1)


@pytest.mark.parametrize("dims", [1, 3, 300])
def test_tiles_fit_the_device(dims):
    """All intermediates of a tile together stay within the bytes that a tile may have."""
    members = (PROGRAMS["sum"].exprs[0] * variable(3, dims, PARAMETER),)
    for batch in ((), (64,)):
        with pretended():
            like = torch.empty(1, device="cuda")
            columns, rows = eager._tile(members, batch, 10**6, like)
        numbers = sum(e.dim for e in eager.walk(*members)) * columns * rows * (64 if batch else 1)
        assert eager.DEVICE_TILE / 8 < 4 * numbers <= eager.DEVICE_TILE


# The choice -------------------------------------------------------------------------------------------------------


def evaluated(p, device, backend="auto", dtype=torch.float32):
    with pretended():
        return Task(p, None, backend).evaluate(fakes(p, device, dtype))


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_run_tile_by_tile_and_say_so_once(device, unsaid):
    message = rf"reductions on {device} run tile by tile in torch.*Triton does not run on {device}; backend='eager'"
    with pytest.warns(BackendWarning, match=message):
        y = evaluated(PROGRAMS["sum"], device)
    assert y.device.type == device and y.shape == (M, 1)
    assert evaluated(PROGRAMS["logsumexp"], device).shape == (M, 1)  # another program: nothing new to say


def test_eager_says_nothing(unsaid):
    assert evaluated(PROGRAMS["sum"], "xpu", "eager").shape == (M, 1)
    assert evaluated(PROGRAMS["sum"], "cuda", "eager").shape == (M, 1)


def test_without_triton_the_fix_is_named(unsaid, monkeypatch):
    monkeypatch.setattr(gpu, "_installed", lambda: False)
    with pytest.warns(BackendWarning, match=r"on cuda .*: Triton is not installed; pip install 'pullback\[gpu\]'"):
        assert evaluated(PROGRAMS["sum"], "cuda").shape == (M, 1)
    with pytest.raises(pb.ArgumentError, match=r"backend='triton' cannot run .*: Triton is not installed"):
        evaluated(PROGRAMS["sum"], "cuda", "triton")


def test_what_triton_does_not_take_is_said_once_for_each_reason(unsaid, monkeypatch):
    monkeypatch.setattr(gpu, "_installed", lambda: True)
    many = [Program("ArgKMin", (PROGRAMS["argmin"].exprs), (OVER_J,), S3, k=LARGEST_K + more) for more in (1, 2)]
    with pytest.warns(BackendWarning, match=rf"K = {LARGEST_K + 1} is more than {LARGEST_K}; backend='eager' does"):
        evaluated(many[0], "cuda")
    assert evaluated(many[0], "cuda").shape == (M, LARGEST_K + 1)
    with pytest.warns(BackendWarning, match=f"K = {LARGEST_K + 2} is more"):
        evaluated(many[1], "cuda")
    with pytest.raises(pb.ArgumentError, match=f"backend='triton' cannot run .*: K = {LARGEST_K + 1} is more"):
        evaluated(many[0], "cuda", "triton")


def test_auto_takes_triton_where_it_runs(monkeypatch):
    monkeypatch.setattr(gpu, "_installed", lambda: True)
    cuda, p = torch.device("cuda", 0), PROGRAMS["sum"]
    for backend in ("auto", "triton", tasks.within(1e-6)):
        assert Task(p, None, backend).uses_triton(cuda, torch.float32)
    for backend in ("eager", "llvm"):
        assert not Task(p, None, backend).uses_triton(cuda, torch.float32)
    assert not Task(p, None, "auto").uses_triton(torch.device("cpu"), torch.float32)


def not_triton(out):
    """Triton cannot compile this."""
    tl.no_such_function(out)  # noqa: F821


def test_a_failure_inside_triton(unsaid, monkeypatch):
    """Triton's compiler fails: "auto" goes on in torch and says why, "triton" lets the error out."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, CompilationError

    tries = []

    def run(*_):
        tries.append(1)
        source = ASTSource(triton.jit(not_triton), {"out": "*fp32"})
        return triton.compile(source, target=GPUTarget("cuda", 80, 32))

    monkeypatch.setattr(gpu, "run", run)
    p = PROGRAMS["sum"]
    one = Task(p, None, "auto")
    message = r"on cuda .*Triton failed with CompilationError: .*; backend='eager'"
    with pytest.warns(BackendWarning, match=message), pretended():
        assert one.evaluate(fakes(p, "cuda")).shape == (M, 1)
    with pretended():
        assert one.evaluate(fakes(p, "cuda")).shape == (M, 1)
    assert len(tries) == 1
    with pytest.raises(CompilationError), pretended():
        Task(p, None, "triton").evaluate(fakes(p, "cuda"))


def test_errors_that_are_not_triton_s_come_out(monkeypatch):
    def broken(*_):
        raise TypeError("ours")

    monkeypatch.setattr(gpu, "_installed", lambda: True)
    monkeypatch.setattr(gpu, "run", broken)
    with pytest.raises(TypeError, match="ours"):
        evaluated(PROGRAMS["sum"], "cuda")


def test_llvm_on_a_device_is_an_error():
    with pytest.raises(pb.ArgumentError, match="backend='llvm' runs on the CPU; the tensors lie on xpu"):
        evaluated(PROGRAMS["sum"], "xpu", "llvm")


# Where the work is done -------------------------------------------------------------------------------------------

F = pb.Genred("Exp(-SqDist(x, y)) * b", ["x = Vi(3)", "y = Vj(3)", "b = Vj(2)"], axis=1)


def three(device="cpu", batch=()):
    return [torch.rand(*batch, k, d, device=device) for k, d in ((M, 3), (N, 3), (N, 2))]


@pytest.mark.parametrize("backend", ["GPU", "GPU_1D", "GPU_2D", "triton"])
def test_cpu_tensors_are_never_copied_to_a_device(backend):
    with pytest.raises(pb.ArgumentError, match=rf"backend='{backend}' .*(needs tensors|runs) on a GPU"):
        F(*three(), backend=backend)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_arguments_on_two_devices(position):
    args = three()
    args[position] = args[position].to("meta")
    with pytest.raises(pb.DeviceError, match=rf"{'xyb'[position]}: meta.*move them to one device"):
        F(*args)


def test_addresses_of_another_device_are_never_read():
    """Also below the checks of what users call."""
    for place in ("meta", "cuda"):
        args = three()[:2]
        with pretended(True) if place == "cuda" else contextlib.nullcontext():
            args.append(torch.empty(N, 1, device=place))
            with pytest.raises(pb.DeviceError, match=rf"argument 2 of Sum.* lies on {place}.*, argument 0 on cpu"):
                Task(PROGRAMS["sum"], None, "auto").evaluate(args)


def test_meta_tensors_give_shapes():
    """As in torch: no numbers, the right shape, dtype and device, derivatives too."""
    x, y, b = three("meta", (4,))
    x.requires_grad_()
    z = F(x, y, b)
    (g,) = torch.autograd.grad(z.sum(), x)
    assert (z.device.type, z.shape, z.dtype) == ("meta", (4, M, 2), torch.float32)
    assert (g.device.type, g.shape) == ("meta", x.shape)
    near = pb.Genred("SqDist(x, y)", ["x = Vi(3)", "y = Vj(3)"], "Min_ArgMin", axis=1)
    values, indices = near(x, y)
    assert values.shape == indices.shape == (4, M, 1) and indices.dtype == torch.int64
    lazy = (-pb.Vi(x).sqdist(pb.Vj(y))).exp()
    assert lazy.logsumexp(2).shape == (4, M, 1) and lazy.logsumexp(2).is_meta
    assert F(x, y, b, tolerance=1e-6).shape == (4, M, 2)


def test_whole_calls_on_fake_devices(unsaid):
    """Genred under FakeTensorMode: shapes, for tools that plan memory before they run."""
    with pretended(), warnings.catch_warnings():
        warnings.simplefilter("error")
        z = F(*three("cuda"))
    assert z.device.type == "cuda" and z.shape == (M, 2)


def test_sizes_need_no_numbers():
    with pretended():
        assert sizes(((3, I), (3, J)), [torch.empty(2, 1, M, 3), torch.empty(5, N, 3)]) == ((2, 5), M, N)


def test_lazy_tensors_copy_nothing(unsaid):
    """Formulas with numbers, on a device: data are made there."""
    with pretended():
        x, y, b = three("cuda")
        K = (-pb.Vi(x).sqdist(pb.Vj(y)) / 2.5).exp()
        calls = [K.sum(1), K.T @ x, (K**1.5 + 0.5).logsumexp(1), K.argKmin(3, 1), K.min(1), K.var(1), K @ b]
    assert all(t.device.type == "cuda" for t in calls)

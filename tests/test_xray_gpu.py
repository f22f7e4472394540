"""The X-ray transform on a GPU: Triton's interpreter against the CPU, compilation for GPUs that need not be at hand.

Triton reads TRITON_INTERPRET when it is imported, so what needs Triton runs in processes of its own: the functions
`check_*` below, by `python test_xray_gpu.py NAME`.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pullback.core.errors import DeviceError
from pullback.imaging import _joseph_triton as gpu
from pullback.imaging import _nufft
from pullback.imaging._joseph import _JosephSampler
from pullback.imaging.fbp import fbp
from pullback.imaging.xray import XRayTransform

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not (INSTALLED and torch.cuda.is_available()), reason="needs a CUDA device and Triton")
F32, F64 = torch.float32, torch.float64
DERIVATIVES = ((0, 0), (1, 0), (1, 1))  # order and row power: the operator, and its derivatives in offset and slope

# dims, number of views, detector pixels, spacing, centre
GEOMETRIES = [
    ((9, 8), 7, 15, 1.0, None),
    ((9, 135), 6, 140, 1.3, 70.2),
    ((19, 13), 6, 40, 0.45, 20.3),
    ((7, 7), 4, 4, 2.6, None),
    ((5, 4), 3, 1, 1.0, None),
]


def views(n, span=2 * math.pi, first=0.013):
    return torch.arange(n, dtype=F64) * (span / n) + first


def rand(*shape, dtype=F64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def sampler(A, order=0, row_power=0):
    """The operator's worker with its rays, or one of its derivatives."""
    tensors, _ = A._geometry()
    worker = A._worker if not order else A._worker._range_derivative(0 if row_power else 1)
    return worker._rebind(tensors)


def both(worker, x, y):
    """Forward and adjoint by the kernels, for batches on any device."""
    rays = gpu._geometry(*(t.to(x.device) for t in worker._held()), worker.dims, worker.dimsd[1])
    options = gpu.options(x.dtype, worker.dims, worker.dimsd[1], worker._least_step, worker._order, worker._row_power)
    return [f(v, rays, options, worker.dims, worker.dimsd) for f, v in ((gpu.project, x), (gpu.spread, y))]


def relative(a, b):
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-300))


def compare(worker, dtype, n=2, device="cpu", positive=False):
    """The kernels against the loops of numba in float64; both directions, and the dot test."""
    x, y = rand(n, *worker.dims, dtype=dtype), rand(n, *worker.dimsd, dtype=dtype, seed=1)
    if positive:
        x, y = x.abs(), y.abs()
    forward, adjoint = (v.cpu() for v in both(worker, x.to(device), y.to(device)))
    assert forward.dtype == adjoint.dtype == dtype
    tolerance = 1e-6 if dtype == F32 else 1e-12
    assert relative(forward, worker._forward(x.double())) < tolerance
    assert relative(adjoint, worker._adjoint(y.double())) < tolerance
    dot = abs(float((forward.double() * y.double()).sum() - (adjoint.double() * x.double()).sum()))
    assert dot <= tolerance * float(forward.double().norm() * y.double().norm())


# Without Triton ------------------------------------------------------------------------------------------------------


def test_options():
    """How many rays can meet a pixel, and where integers hold positions."""
    make = lambda dtype, step, order=0: gpu.options(dtype, (64, 64), 90, step, order, 0)  # noqa: E731
    assert [make(F32, step).meets for step in (0.5, 0.9, 1.0, 1.9, 2.0, 7.0)] == [4, 3, 2, 2, 1, 1]
    assert [make(F64, step).meets for step in (0.5, 1.0, 2.0)] == [5, 3, 2]
    assert make(F32, 1.0, order=1).meets == 3
    assert [make(F32, step).fixed for step in (1e-4, 1e-2, 1.0, 1e3, 1e7)] == [False, True, True, True, False]
    assert not make(F64, 1.0).fixed


def test_geometry():
    """Rays are sorted by axis and slope; integers give the same lines."""
    A = XRayTransform((12, 9), views(13)[torch.randperm(13)], 20, 1.3, 8.4)
    slope, offset, swap = A._geometry()[0]
    rays = gpu._geometry(slope, offset, swap, A.dims, 20)
    n = int(rays.steep)
    assert n == int((~swap).sum())
    assert not swap[rays.order[:n]].any() and swap[rays.order[n:]].all()
    for part in (slice(0, n), slice(n, None)):
        assert (rays.lines[1, part].diff() >= 0).all()
    base, across, step, kept = rays.ints[:, :4].T
    torch.testing.assert_close(base.double() * 2.0**-32, rays.lines[0] + kept * rays.lines[2], rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.stack((across, step)).double() * 2.0**-32, rays.lines[1:3], rtol=0, atol=1e-9)
    floats = rays.ints[:, 6:8].to(torch.int32).view(F32).double()
    torch.testing.assert_close(floats[:, 0] * floats[:, 1], torch.ones(13, dtype=F64), rtol=1e-6, atol=0)


def test_geometry_is_kept_while_it_is_the_same():
    A = XRayTransform((6, 6), views(5), 9)
    tensors = A._geometry()[0]
    rays = gpu.geometry(*tensors, A.dims, 9)
    assert gpu.geometry(*tensors, A.dims, 9) is rays
    assert gpu.geometry(*tensors, A.dims, 8) is not rays
    moved = (tensors[0], tensors[1] + 1, tensors[2])
    assert gpu.geometry(*moved, A.dims, 9) is not rays
    tensors[0].mul_(0.5)
    assert gpu.geometry(*tensors, A.dims, 9) is not rays
    n = len(gpu._kept)
    del A, tensors, moved
    assert len(gpu._kept) == n - 1


def test_the_host_looks_at_no_number(monkeypatch):
    """All but the kernels themselves runs on the meta device, where reading a number is an error."""
    launched = []
    record = lambda kernel: {(n,): lambda *a, n=n, **k: launched.append((kernel, n)) for n in range(1, 100)}  # noqa: E731
    monkeypatch.setattr(gpu, "compiled", record)
    A = XRayTransform((40, 30), views(20), 50).to("meta")
    for order, row_power in DERIVATIVES:
        worker = sampler(A, order, row_power)
        x, y = torch.empty(3, 40, 30, device="meta"), torch.empty(3, 20, 50, device="meta")
        forward, adjoint = both(worker, x, y)
        assert forward.shape == (3, 20, 50) and adjoint.shape == (3, 40, 30)
        assert forward.device.type == adjoint.device.type == "meta"
    # 3 images: 10 + 1 tiles of 2 views, one of 128 pixels; 10 (in derivatives 20) tiles of rows, one of 128 columns
    sizes = [n for _, n in launched]
    assert sizes == [33, 30, 33, 60, 33, 60]
    assert [k for k, _ in launched] == 3 * [gpu.project_tile, gpu.spread_tile]


def test_errors_say_what_to_do(monkeypatch):
    A = XRayTransform((6, 6), views(5), 9)
    with pytest.raises(DeviceError, match=r"got a tensor on meta; move the operator and the tensor with .to\('cpu'\)"):
        sampler(A)._on_gpu(torch.empty(1, 6, 6, device="meta"), False)
    gpu_device = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="needs Triton on a CUDA device; pip install triton"):
        gpu.require(gpu_device)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    gpu.require(gpu_device)
    B = XRayTransform((6, 6), views(5), 9, method="fourier")
    worker = B._worker._rebind(B._geometry()[0])
    values = torch.empty(1, 6, 6, dtype=torch.complex64, device="meta")
    with pytest.raises(
        DeviceError, match=r"method='fourier' runs on the CPU and on CUDA devices; got a tensor on meta"
    ):
        worker._on_gpu(2, values, values)


@pytest.mark.skipif(importlib.util.find_spec("cufinufft") is not None, reason="cufinufft is installed")
def test_fourier_names_the_missing_package():
    B = XRayTransform((6, 6), views(5), 9, method="fourier")
    with pytest.raises(DeviceError, match=r"needs cufinufft .*No module named 'cufinufft'; pip install cufinufft"):
        _nufft._plan_on_gpu(2, B._geometry()[0], (6, 6), 1, torch.complex64, 0)


def test_import_needs_no_triton():
    for node in ast.parse(Path(gpu.__file__).read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
        assert not any(str(name).startswith("triton") for name in names)


# With Triton ---------------------------------------------------------------------------------------------------------


def run_checks(*names, interpret=True):
    env = dict(os.environ, TRITON_INTERPRET="1" if interpret else "0", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, __file__, *names], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@needs_triton
@pytest.mark.slow
def test_interpreter():
    run_checks("check_few")


@needs_triton
@pytest.mark.slow
def test_interpreter_all():
    run_checks("check_geometries", "check_edges", "check_tiles", "check_large", "check_operator")


@needs_triton
@pytest.mark.slow
def test_compiled():
    run_checks("check_compiled", "check_binding", interpret=False)


def check_few():
    for dtype in (F32, F64):
        A = XRayTransform((7, 10), views(5), 12, 0.8, 5.3)
        for derivative in DERIVATIVES:
            compare(sampler(A, *derivative), dtype)


def check_geometries():
    for dims, n_views, n_k, spacing, center in GEOMETRIES:
        A = XRayTransform(dims, views(n_views), n_k, spacing, center)
        for dtype in (F32, F64):
            for derivative in DERIVATIVES:
                compare(sampler(A, *derivative), dtype)


def check_edges():
    """Rays through pixel centres, detectors that see nothing, very coarse and very fine ones, no views of a kind."""
    axes = [0.0, math.pi / 2, math.pi, 0.3]
    for dtype in (F32, F64):
        for angles, n_k, spacing, center in (
            (axes, 9, 1.0, None),
            (axes, 9, 0.5, 3.0),
            ([0.1, 0.2, -0.3], 9, 1.0, None),  # all run over rows
            ([1.5, 1.6], 9, 1.0, None),  # all run over columns
            ([0.0], 7, 1.0, None),
            ([0.4], 9, 1.0, None),
            (axes, 9, 1.0, 1e9),
            (axes, 9, 1.0, -1e13),
            ([0.1, 0.9, 2.0], 5, 40.0, 2.01),
            ([0.1, 0.9, 2.0], 5, 1e7, 2.0 + 1e-8),
            ([0.1, 0.9, 2.0], 30, 0.04, 14.2),
        ):
            A = XRayTransform((8, 7), angles, n_k, spacing, 4.0)
            A.center.fill_((n_k - 1) / 2 if center is None else center)
            for derivative in ((0, 0),) if angles is axes else DERIVATIVES:
                compare(sampler(A, *derivative), dtype)
        A = XRayTransform((8, 7), [0.1, 0.9, 2.0], 9)
        A.angles[1] = math.nan
        forward, adjoint = both(sampler(A), rand(2, 8, 7, dtype=dtype), rand(2, 3, 9, dtype=dtype))
        assert forward[:, 1].isnan().all() and adjoint.isnan().all()
        assert forward[:, [0, 2]].isfinite().all()


def check_tiles():
    """The large tiles; a batch in parts."""
    A = XRayTransform((9, 14), views(10), 20)
    gpu._SCRATCH = 2 * 9 * 14 * 8
    for dtype in (F32, F64):
        compare(sampler(A), dtype, 3)
    gpu._MANY = 0
    for dtype in (F32, F64):
        for derivative in DERIVATIVES:
            compare(sampler(A, *derivative), dtype, 2)


def check_large():
    """Single precision on a larger image, where positions have many digits; positive data, where errors add up."""
    A = XRayTransform((30, 1500), [-0.7, -0.2, 0.01, 0.6], 1600)
    for positive in (False, True):
        compare(sampler(A), F32, 1, positive=positive)
    for angle in (0.5, -0.5):  # the last ray of a tile meets the image in some rows only, or the first of one
        for center in (218.7, 36.25):
            compare(sampler(XRayTransform((30, 200), [angle], 300, 1.0, center)), F32, 1)


def check_operator():
    """The public operator, with every tensor sent to the kernels: batches, complex numbers, all gradients."""
    A = XRayTransform((6, 7), views(5), 9, 0.9, 4.2)
    angles, center = A.angles.clone().requires_grad_(), A.center.clone().requires_grad_()
    B = XRayTransform((6, 7), angles, 9, 0.9, center)
    x, y = rand(2, 6, 7), rand(2, 5, 9, seed=1)
    z = torch.complex(x, x.flip(0))

    def results():
        u, v = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = B(u).square().sum() + B.H(v).square().sum()
        first = torch.autograd.grad(loss, (u, v, angles, center), create_graph=True)
        second = torch.autograd.grad(first[2].square().sum() + first[3].square(), (u, v, angles, center))
        return [A(x), A.H(y), A(z), A.H(A(z.conj())), A(x[0].T.contiguous().T), A(x[:0]), fbp(A, y), *first, *second]

    expected = results()
    calls = []

    def on_gpu(self, values, adjoint):
        calls.append(adjoint)
        return _JosephSampler._on_gpu(self, values, adjoint)

    gpu.require = lambda device: None
    _JosephSampler._on_cpu = on_gpu
    for got, want in zip(results(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert True in calls and False in calls
    half = A(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half, expected[0]) < 1e-2


def check_compiled():
    """Code for two generations of NVIDIA and one of AMD, without spills."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        for kernel, pointer, constants in variants():
            names = gpu._names(kernel)
            types = {"steep": "*i64", "ints": "*i64", "lines": "*fp64", "gains": "*fp64"}
            signature = {n: "i32" if n.startswith("n_") else types.get(n, pointer) for n in names}
            signature |= dict.fromkeys(constants, "constexpr")
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
            fixed = {(names.index(n),): value for n, value in constants.items()}
            source = ASTSource(gpu.compiled(kernel), signature, constexprs=fixed, attrs=aligned)
            made = triton.compile(source, target=target, options={"num_warps": gpu._WARPS})
            registers, spilled = usage(made, target)
            print(target.arch, kernel.__name__, pointer, constants, f"{registers} registers, {spilled} spilled")
            assert spilled == 0
            assert made.metadata.shared <= 48 * 1024


def check_binding():
    """Triton takes the arguments as they are launched, and compiles nothing for another size."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:  # of a GPU that is not there
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    def launch(kernel, grid, *args, **constants):
        gpu.compiled(kernel).warmup(*args, **constants, num_warps=gpu._WARPS, grid=(grid,))

    driver.set_active(Driver())
    gpu._launch = launch
    for n in (40, 41, 64, 1):
        A = XRayTransform((n, n + 3), views(20), n + 20)
        for dtype in (F32, F64):
            both(sampler(A), torch.randn(3, *A.dims, dtype=dtype), torch.randn(3, *A.dimsd, dtype=dtype))
    for kernel in (gpu.project_tile, gpu.spread_tile):
        assert len(gpu.compiled(kernel).device_caches[0][0]) == 2, kernel.__name__  # one for each dtype


def variants():
    for pointer, fixed in (("*fp32", True), ("*fp32", False), ("*fp64", False)):
        for order, row_power in DERIVATIVES:
            for size in () if row_power else gpu._VIEWS:
                tile = {"VIEWS": size, "BINS": gpu._WIDTH}
                yield gpu.project_tile, pointer, {"FIXED": fixed, "ORDER": order, **tile}
            for size in gpu._ROWS[:2] if fixed and not order else gpu._ROWS[2:]:
                tile = {"ROWS": size, "COLUMNS": gpu._WIDTH}
                for count in (3,) if order else (1, 2, 3, 5):
                    options = {"FIXED": fixed, "ORDER": order, "ROW_POWER": row_power, "COUNT": count}
                    yield gpu.spread_tile, pointer, options | tile


def usage(made, target):
    """(registers of a thread, bytes or registers that were spilled), from the assembler or the binary's notes."""
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        vector, *spilled = (int(re.search(rf"\.{k}:\s+(\d+)", text).group(1)) for k in names)
        return vector, sum(spilled)
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    name = f"sm_{target.arch}{'a' if target.arch == 90 else ''}"
    command = [str(ptxas), "-v", f"--gpu-name={name}", "-", "-o", "/dev/null"]
    text = subprocess.run(command, input=made.asm["ptx"], capture_output=True, text=True, check=True).stderr
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups())
    return int(re.search(r"Used (\d+) registers", text).group(1)), stores + loads


# With a GPU ----------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64])
def test_gpu_kernels(dtype):
    for dims, n_views, n_k, spacing, center in (*GEOMETRIES, ((300, 260), 70, 400, 0.97, 190.0)):
        A = XRayTransform(dims, views(n_views), n_k, spacing, center)
        for derivative in DERIVATIVES:
            compare(sampler(A, *derivative), dtype, device="cuda")
    compare(sampler(XRayTransform((2048, 2048), views(40), 2897)), dtype, 1, device="cuda", positive=True)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("method", ["joseph", "fourier"])
def test_gpu_operator_waits_for_nothing(method):
    """All gradients equal those of the CPU, every run gives the same, no call waits."""
    if method == "fourier" and importlib.util.find_spec("cufinufft") is None:
        pytest.skip("needs cufinufft")
    x, angles, center = rand(2, 24, 30), views(11), torch.tensor(18.3, dtype=F64)

    def results(device, A=None):
        given = [t.to(device).requires_grad_() for t in (x, angles, center)]
        A = XRayTransform((24, 30), given[1], 40, center=given[2], method=method)
        loss = lambda: (A.H(A(given[0])) * given[0]).sum()  # noqa: E731
        loss()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if method == "joseph" else "default")
        try:
            return torch.autograd.grad(loss(), given)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    first, again, expected = results("cuda"), results("cuda"), results("cpu")
    for a, b, c in zip(first, again, expected, strict=True):
        if method == "joseph":
            assert torch.equal(a, b)
        torch.testing.assert_close(a.cpu(), c, rtol=1e-9, atol=1e-9)


@needs_gpu
@pytest.mark.gpu
def test_gpu_graph_and_stream():
    """Recorded in a CUDA graph, and on another stream, with rays that were never used before on it."""
    A = XRayTransform((40, 40), views(30), 60).to("cuda")
    x = torch.randn(40, 40, device="cuda")
    expected = A.H(A(x))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other = A.H(A(x))
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(other, expected)
    graph = torch.cuda.CUDAGraph()
    kept = x.clone()
    with torch.cuda.graph(graph):
        recorded = A.H(A(kept))
    for scale in (1.0, 2.0):
        kept.copy_(x * scale)
        graph.replay()
        torch.testing.assert_close(recorded, scale * expected)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_more_than_two_billion_results():
    if torch.cuda.get_device_properties(0).total_memory < 48e9:
        pytest.skip("needs 48 GB")
    A = XRayTransform((8, 8), views(64), 64).to("cuda")
    n = 2**31 // 64**2 + 3
    x = torch.randn(n, 8, 8, device="cuda")
    y = A(x)
    torch.testing.assert_close(y[-3:], A(x[-3:]))
    torch.testing.assert_close(A.H(y)[-3:], A.H(y[-3:].clone()))


def main(names):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in names:
        globals()[name]()


if __name__ == "__main__":
    main(sys.argv[1:])

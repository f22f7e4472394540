"""Operators never make the host wait for a GPU: checked without one on the meta device, where there are no numbers.

Reading a number (`.item()`, `bool(t)`, `.cpu()`, `.numpy()`, `nonzero`) is an error there, as it is a wait on a GPU.
The bridge is told to take meta tensors for ordinary ones, so that operators run the code that they run on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch
from registry import algebra_examples, public_classes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pullback as pb
from pullback.core import autograd

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:reductions on meta run tile by tile"),
]

CASES = {f"{c.__name__}{i}": (c, i) for c in public_classes() for i in range(len(list(c.examples())))}
CASES |= {f"algebra{i}": (None, i) for i in range(len(algebra_examples()))}

HOST = "wraps code that runs on the host"
META = "torch multiplies no sparse matrices on the meta device"
XRAY = "runs its own kernels: test_xray_gpu.py"
NOT_ON_META = {
    "FunctionOperator2": HOST,
    "TorchOperator0": HOST,
    "TorchOperator1": HOST,
    "TorchOperator2": HOST,
    "MatrixMult3": META,
    "MatrixMult4": META,
    **{f"XRayTransform{i}": XRAY for i in range(5)},
}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = list(CASES) if torch.cuda.is_available() else ["every example"]  # one skip without a GPU, not 186


def example(name):
    cls, i = CASES[name]
    return algebra_examples()[i] if cls is None else list(cls.examples())[i]


class NoUpload(TorchDispatchMode):
    """Refuses operations that bring an array from the host to another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" and t.ndim for t in leaves):
            results = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            assert all(t.device.type == "cpu" for t in results), f"{func} copies from the host"
        return result


@pytest.fixture
def ordinary(monkeypatch):
    """The bridge takes meta tensors for tensors with numbers, and torch.tensor makes none on another device."""
    eager = lambda x: type(x) in autograd._PLAIN and autograd._interpreter() is None  # noqa: E731
    monkeypatch.setattr(autograd, "is_eager", eager)
    make = torch.tensor

    def tensor(data, *args, device=None, **kwargs):
        uploading = torch._C._len_torch_dispatch_stack() and torch.device(device or "cpu").type != "cpu"
        assert not uploading, "torch.tensor copies from the host"
        return make(data, *args, device=device, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)


def dtypes_of(A, adjoint, precision):
    real = A._real_range if adjoint else A._real_domain
    return (precision,) if real else (precision, precision.to_complex())


def apply_and_differentiate(A, adjoint, x):
    y = (A.H if adjoint else A)(x)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y, g


def run_on_meta(A):
    M = A.to("meta")
    for adjoint in (False, True):
        dims, dims_out = (A.dimsd, A.dims) if adjoint else (A.dims, A.dimsd)
        for dtype in dtypes_of(A, adjoint, torch.float32):
            x = torch.empty(2, *dims, dtype=dtype, device="meta", requires_grad=True)
            # Tables of constants may be made in the first call, and never again.
            for context in (contextlib.nullcontext(), NoUpload()):
                with context:
                    y, g = apply_and_differentiate(M, adjoint, x)
                assert y.device.type == "meta" and y.shape == (2, *dims_out)
                assert y.dtype == A._out_dtype(dtype, adjoint)
                assert g.shape == x.shape and g.dtype == x.dtype


# The quick run takes the first example of every class.
ON_META = [
    pytest.param(k, marks=[pytest.mark.slow] if i else []) for k, (_, i) in CASES.items() if k not in NOT_ON_META
]


@pytest.mark.parametrize("name", ON_META)
def test_no_operator_looks_at_the_numbers(name, ordinary):
    run_on_meta(example(name))


@pytest.mark.parametrize("name", NOT_ON_META)
def test_the_exceptions_are_needed(name, ordinary):
    with pytest.raises((NotImplementedError, TypeError, pb.DeviceError)):
        run_on_meta(example(name))


class Twice(pb.LinearOperator):
    def __init__(self):
        super().__init__(3)

    def _forward(self, x):
        return 2 * x

    def _adjoint(self, y):
        return 2 * y


class Reads(Twice):
    def _forward(self, x):
        return 2 * x if x.detach().norm() > 0 else x.clone()


class Uploads(Twice):
    def _forward(self, x):
        return x * torch.tensor([2, 2, 2], dtype=x.dtype, device=x.device)


class Copies(Twice):
    def _forward(self, x):
        return x * torch.full((3,), 2.0).to(x.device, x.dtype)


def test_mutants_are_caught(ordinary):
    run_on_meta(Twice())
    for mutant, message in ((Reads, "meta"), (Uploads, "copies from the host"), (Copies, "copies from the host")):
        with pytest.raises((RuntimeError, AssertionError), match=message):
            run_on_meta(mutant())


# With a GPU ----------------------------------------------------------------------------------------------------------


@NEEDS_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_without_waiting(name):
    """Forward, adjoint and gradient equal those of the CPU; after a first call that makes tables, nothing waits."""
    if NOT_ON_META.get(name) == HOST:
        pytest.skip(HOST)
    A = example(name)
    if getattr(A, "method", "") == "fourier" and importlib.util.find_spec("cufinufft") is None:
        pytest.skip("needs cufinufft")
    G = A.to("cuda")
    for adjoint in (False, True):
        dims = A.dimsd if adjoint else A.dims
        for dtype in dtypes_of(A, adjoint, torch.float64):
            x = torch.randn(2, *dims, dtype=dtype, requires_grad=True)
            there = x.detach().cuda().requires_grad_()
            apply_and_differentiate(G, adjoint, there.detach().mul(2).requires_grad_())
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = apply_and_differentiate(G, adjoint, there)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for ours, expected in zip(got, apply_and_differentiate(A, adjoint, x), strict=True):
                assert ours.is_cuda
                torch.testing.assert_close(ours.cpu(), expected, rtol=1e-10, atol=1e-10)

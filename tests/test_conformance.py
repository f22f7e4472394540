"""The conformance kit over every operator class, and mutants that show that the kit can fail."""

import pytest
import torch
from registry import algebra_examples, public_classes

import pullback as pb
from pullback.core.check import CheckError

CASES = [(c, i) for c in public_classes() for i in range(len(list(c.examples())))]


@pytest.mark.parametrize("cls", public_classes(), ids=lambda c: c.__name__)
def test_every_public_class_has_examples(cls):
    assert len(list(cls.examples())) > 0, f"{cls.__name__}.examples() yields nothing, so the kit never runs on it"


# About a second each: the quick run checks the first example of every class but of those that are several others.
LONG = {"Block", "ConvolveND", "DWT2D", "DWTND", "FFT2D", "FFTND", "Kronecker", "Curvature", "Smoothing2D", "Laplacian"}
PARAMETERS = [pytest.param(c, i, marks=pytest.mark.slow) if i or c.__name__ in LONG else (c, i) for c, i in CASES]


@pytest.mark.parametrize(("cls", "i"), PARAMETERS, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_kit_passes(cls, i):
    pb.check(list(cls.examples())[i]).raise_if_failed()


ALGEBRA = [pytest.param(i, marks=pytest.mark.slow) if i % 6 else i for i in range(len(algebra_examples()))]


@pytest.mark.parametrize("i", ALGEBRA)
def test_kit_passes_on_algebra(i):
    pb.check(algebra_examples()[i]).raise_if_failed()


# Mutants: each breaks one promise and must be caught by the test that guards it. ------------------------------------

M = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Good(pb.LinearOperator):
    def __init__(self):
        super().__init__(4, 3)

    def _forward(self, x):
        return x @ M.to(x.dtype).T

    def _adjoint(self, y):
        return y @ M.to(y.dtype)


class ScaledAdjoint(Good):
    def _adjoint(self, y):
        return super()._adjoint(y) * (1 + 1e-6)


class TransposeForAdjoint(pb.LinearOperator):
    _native = True

    def __init__(self):
        super().__init__(4, 3)
        self.A = M * (1 + 1j)

    def _forward(self, x):
        return x.to(self.A.dtype) @ self.A.T

    def _adjoint(self, y):
        return y.to(self.A.dtype) @ self.A


class WrongTangent(pb.LinearOperator):
    _native = True

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x @ M.T

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return g @ M

        @staticmethod
        def jvp(ctx, t):
            return (t @ M.T) * (1 + 1e-5)

    def __init__(self):
        super().__init__(4, 3)
        self._real_domain = self._real_range = True

    def _forward(self, x):
        return self.Function.apply(x.to(torch.float64)).to(x.dtype)

    def _adjoint(self, y):
        return y @ M.to(y.dtype)


class DroppedParameterGradient(pb.LinearOperator):
    _native = True

    def __init__(self):
        super().__init__(4)
        self.w = torch.arange(1.0, 5, dtype=torch.float64)

    def _forward(self, x):
        return x * self.w.detach().to(x.dtype)

    def _adjoint(self, y):
        return y * self.w.to(y.dtype)


class HalfParameterGradient(DroppedParameterGradient):
    def _forward(self, x):
        return x * (0.5 * self.w + 0.5 * self.w.detach()).to(x.dtype)


class UndeclaredTensor(pb.LinearOperator):
    def __init__(self):
        super().__init__(4)
        self._secret = [torch.arange(1.0, 5, dtype=torch.float64, requires_grad=True)]

    def _forward(self, x):
        return x * self._secret[0].to(x.dtype)

    _adjoint = _forward


class NotLinear(Good):
    def _forward(self, x):
        return super()._forward(x) + 1e-6


class ForcedDtype(Good):
    def _forward(self, x):
        return super()._forward(x.to(torch.float64 if not x.is_complex() else torch.complex128))


class DropsImaginary(Good):
    def _forward(self, x):
        return super()._forward(x.real.to(x.dtype))


class Mutates(Good):
    def _forward(self, x):
        y = super()._forward(x)
        x.mul_(2)
        return y


class Shares(pb.LinearOperator):
    def __init__(self):
        super().__init__(4)

    def _forward(self, x):
        return x.view(x.shape)

    _adjoint = _forward


class KeepsState(Good):
    def _forward(self, x):
        self.__dict__.setdefault("_out", {})
        key = (tuple(x.shape), x.dtype)
        if key not in self._out:
            self._out[key] = super()._forward(x).detach()
        return self._out[key]


class WrongBatch(Good):
    def _forward(self, x):
        y = super()._forward(x)
        return y.flip(0) if y.ndim > 1 else y


class WrongFakeDtype(Good):
    def _out_dtype(self, dtype, adjoint):
        return torch.float32


class CannotPickle(Good):
    def __init__(self):
        super().__init__()
        self._f = lambda x: x


class NeedsContiguous(Good):
    def _forward(self, x):
        return torch.as_strided(x, x.shape, torch.empty(x.shape).stride()) @ M.to(x.dtype).T


MUTANTS = {
    ScaledAdjoint: "dot test",
    TransposeForAdjoint: "dot test",
    WrongTangent: "torch.func.jvp",
    DroppedParameterGradient: "gradients of held tensors",
    HalfParameterGradient: "gradients of held tensors",
    UndeclaredTensor: "backward equals adjoint",
    NotLinear: "linearity",
    ForcedDtype: "dtypes",
    DropsImaginary: "dot test",
    Mutates: "no mutation, no aliasing",
    Shares: "no mutation, no aliasing",
    KeepsState: "no mutation, no aliasing",
    WrongBatch: "batch equals loop",
    WrongFakeDtype: "FakeTensor",
    CannotPickle: "pickle, copy, to, state_dict",
    NeedsContiguous: "strided, expanded, conjugate input",
}


def test_the_unbroken_operator_passes():
    report = pb.check(Good())
    assert report.ok, str(report)
    assert not [r for r in report.results if r.status == "skipped" and "tensor" not in r.name]


@pytest.mark.parametrize(("mutant", "guard"), MUTANTS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_mutants_are_caught(mutant, guard):
    report = pb.check(mutant(), compile=False)
    assert guard in report.failures, str(report)


def test_dottest_returns_the_error_and_raises():
    assert pb.dottest(Good()) < 1e-14
    with pytest.raises(CheckError, match=r"dot test of ScaledAdjoint.*= .*e-0[67] > 1e-11"):
        pb.dottest(ScaledAdjoint())


def test_report_reads_as_a_table():
    text = str(pb.check(ScaledAdjoint(), compile=False))
    assert "failed  dot test" in text
    assert "passed  linearity" in text
    with pytest.raises(CheckError, match="dot test"):
        pb.check(ScaledAdjoint(), compile=False).raise_if_failed()


def test_check_refuses_what_is_no_operator():
    with pytest.raises(pb.ArgumentError, match="wrap it with TorchOperator"):
        pb.check(lambda x: x)

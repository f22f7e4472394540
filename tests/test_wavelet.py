"""Wavelet transforms: the kit, PyWavelets as the definition of the values, adjoints, inverses, gradients, errors."""

import math
import warnings

import numpy as np
import pytest
import torch

from pullback.core.check import CheckError, check, dottest
from pullback.core.errors import ArgumentError, ShapeError
from pullback.linops import _wavelet_apply as blocks
from pullback.linops import _wavelet_numba as compiled
from pullback.linops._wavelet_bank import MODES
from pullback.linops.basic import Identity
from pullback.linops.wavelet import DWT, DWT2D, DWTND

pywt = pytest.importorskip("pywt")

WAVELETS = ["haar", "db2", "db4", "sym5", "bior2.2", "rbio1.3", "bior3.1", "coif2", "dmey"]
SIZES = [2, 3, 5, 8, 13, 33, 65, 66, 131]


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(params=["torch", "numba"])
def way(request, monkeypatch):
    """Everything by the torch code, or everything by numba."""
    if request.param == "torch":
        monkeypatch.setattr(blocks, "_NATIVE", math.inf)
    else:
        pytest.importorskip("numba")
        monkeypatch.setattr(blocks, "_NATIVE", 0)
        monkeypatch.setattr(blocks, "_NATIVE_BLOCK", 500)
    monkeypatch.setattr(blocks, "_BLOCK", 500)
    return request.param


def random(*shape, dtype=torch.float64, seed=7):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def packed(x, wavelet, mode, level, axes):
    """Of PyWavelets; `axes` must be all axes of x."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the level is higher than PyWavelets likes
        return pywt.coeffs_to_array(pywt.wavedecn(x, wavelet, mode, level, axes), axes=axes)[0]


def close(a, b, tol=1e-12):
    a, b = (t if isinstance(t, torch.Tensor) else torch.from_numpy(t) for t in (a, b))
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tol * max(1.0, float(b.abs().max()))


def holds(A, wavelet, tol=1e-12):
    """The dot tests of A and of its inverse, and that the inverse is one."""
    dottest(A, rtol=tol, n_pairs=1)
    R = A.inverse()
    dottest(R, rtol=tol, n_pairs=1)
    x = random(2, *A.dims)
    y = A(x)
    close(R(y), x, (5e-2 if wavelet == "dmey" else 1e-10) * max(1.0, float(y.abs().max())))


# Values --------------------------------------------------------------------------------------------------------------


def sweep(wavelet, sizes, modes):
    for mode in modes:
        for n in sizes:
            for level in range(1, min(3, math.ceil(math.log2(n))) + 1):
                A = DWT(n, wavelet=wavelet, level=level, mode=mode)
                x = random(n)
                close(A(x), packed(x.numpy(), wavelet, mode, level, (0,)))
                holds(A, wavelet)


@pytest.mark.parametrize("wavelet", ["db2", "bior2.2"])
def test_one_axis_equals_pywt_and_adjoints_are_exact(wavelet, way):
    sweep(wavelet, [2, 3, 7, 66, 131], MODES)


@pytest.mark.slow
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_one_axis_equals_pywt_for_many_wavelets(wavelet, way):
    sweep(wavelet, SIZES, MODES)


CASES = [
    ((8, 12), (0, 1), "db2", "periodization", 2),
    ((7, 9), (1, 0), "bior2.2", "symmetric", 2),
    ((70, 67), (0, 1), "db4", "reflect", 3),
    ((70, 66), (0, 1), "haar", "periodization", 1),
    ((128, 136), (0, 1), "haar", "periodization", 3),
    ((128, 136), (1, 0), "rbio1.3", "antireflect", 3),
    ((66, 3, 68), (2, 0, 1), "bior2.2", "smooth", 1),
    ((3, 5, 4), (0, 1, 2), "db4", "zero", 2),
    ((2, 66, 4, 5), (0, 1, 2, 3), "haar", "constant", 1),
]


@pytest.mark.parametrize(("dims", "axes", "wavelet", "mode", "level"), CASES)
def test_several_axes_equal_pywt(dims, axes, wavelet, mode, level, way):
    A = DWTND(dims, axes, wavelet, level, mode)
    x = random(*dims)
    close(A(x), packed(x.numpy(), wavelet, mode, level, axes))
    holds(A, wavelet)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(0, 2), pytest.param((-1, 0), marks=pytest.mark.slow), (1,), (2, 1)])
def test_other_axes_are_a_batch(axes, way):
    dims = (66, 5, 70)
    A = DWTND(dims, axes, "db2", 1 if 1 in axes else 2, "symmetric")
    x = random(2, *dims)
    left = [a for a in range(3) if a not in [b % 3 for b in axes]]
    y = A(x)
    order = [0, *(1 + a for a in left), *(1 + a % 3 for a in axes)]
    back = np.argsort(order)
    moved = x.permute(order).flatten(0, len(left)).numpy()
    expected = np.stack([packed(m, "db2", "symmetric", A.level, tuple(range(len(axes)))) for m in moved])
    lead = [x.shape[i] for i in order[: 1 + len(left)]]
    close(y, expected.reshape(*lead, *expected.shape[1:]).transpose(back))
    holds(A, "db2")


@pytest.mark.parametrize("dims", [(128, 136), (67, 70), (5, 6)])
def test_complex_float32_strided_batches_and_empty_batches(dims, way):
    A = DWT2D(dims, wavelet="bior4.4", level=2, mode="reflect")
    z = random(3, *dims, dtype=torch.complex128)
    close(A(z), torch.complex(A(z.real.contiguous()), A(z.imag.contiguous())))
    close(A.H(A(z)), torch.complex(A.H(A(z.real.contiguous())), A.H(A(z.imag.contiguous()))))
    x = z.real
    close(A(x.float()).double(), A(x), 2e-6)
    assert A(x.float()).dtype == torch.float32
    close(A(x.mT.contiguous().mT), A(x.contiguous()))
    close(A(x[:, None])[:, 0], A(x))
    assert A(x[:0]).shape == (0, *A.dimsd)
    assert A.H(A(x[:0])).shape == (0, *dims)


def test_level_zero_is_the_identity():
    A = DWT2D((4, 6), level=0)
    x = random(4, 6)
    assert torch.equal(A(x), x) and torch.equal(A.H(x), x) and torch.equal(A.inverse()(x), x)
    assert A.split(x)[0].shape == (4, 6)


# Structure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wavelet", "mode"), [("db3", "periodization"), ("bior2.2", "symmetric")])
def test_split_and_pack_are_those_of_pywt(wavelet, mode):
    x = random(2, 20, 22)
    A = DWT2D((20, 22), wavelet=wavelet, level=2, mode=mode)
    ours, theirs = A.split(A(x)), pywt.wavedec2(x.numpy(), wavelet, mode, 2)
    close(ours[0], theirs[0])
    for level, expected in zip(ours[1:], theirs[1:], strict=True):
        for a, b in zip(level, expected, strict=True):
            close(a, b)
    assert torch.equal(A.pack(ours), A(x))
    assert ours[1][0].untyped_storage().data_ptr() == ours[0].untyped_storage().data_ptr()
    close(A.inverse()(A.pack(theirs)), x, 1e-11)
    B = DWT((3, 21), wavelet=wavelet, level=2, mode=mode)
    for a, b in zip(B.split(B(x[0, :3, :21])), pywt.wavedec(x[0, :3, :21].numpy(), wavelet, mode, 2), strict=True):
        close(a, b)
    assert torch.equal(B.pack(B.split(B(x[0, :3, :21]))), B(x[0, :3, :21]))
    C = DWTND((20, 22), (1, 0), wavelet, 2, mode)
    parts = C.split(C(x[0]))
    for level, expected in zip(parts[1:], pywt.wavedecn(x[0].numpy(), wavelet, mode, 2, (1, 0))[1:], strict=True):
        for key in expected:
            close(level[key], expected[key])
    assert torch.equal(C.pack(parts), C(x[0]))


def test_orthogonal_transforms_say_so():
    A = DWT2D((16, 24), wavelet="db4", level=3)
    eye = torch.eye(16 * 24, dtype=torch.float64)
    close(A.todense() @ A.todense().T, eye, 1e-10)
    assert A._coisometry() == 1.0 and A._norm_bound() == 1.0 and isinstance(A.gram, Identity)
    for other in (
        DWT2D((16, 20), wavelet="db4", level=3),
        DWT2D((16, 24), wavelet="bior2.2", level=3),
        DWT2D((16, 24), wavelet="db4", level=3, mode="symmetric"),
        DWT2D((16, 24), wavelet="dmey"),
    ):
        assert other._coisometry() is None and other._norm_bound() is None and not isinstance(other.gram, Identity)
    # Zeros outside: an isometry that is not onto.
    B = DWT(13, wavelet="db3", level=2, mode="zero")
    assert B._coisometry() is None and B._norm_bound() == 1.0 and isinstance(B.gram, Identity)
    close(B.todense().T @ B.todense(), torch.eye(13, dtype=torch.float64), 1e-10)


def test_the_inverse_is_not_the_adjoint_of_a_biorthogonal_transform():
    class Mutant(DWT2D):
        def _adjoint(self, y):
            return self.inverse()(y)

    dottest(Mutant((8, 8), wavelet="db2"))
    with pytest.raises(CheckError, match="dot test of Mutant"):
        dottest(Mutant((8, 8), wavelet="bior2.2"))
    with pytest.raises(CheckError, match="dot test of Mutant"):
        dottest(Mutant((8, 8), wavelet="db2", mode="symmetric"))


@pytest.mark.slow
@pytest.mark.parametrize("cls", [DWT, DWT2D, DWTND])
def test_inverses_pass_the_kit(cls):
    A = next(cls.examples())
    check(A.inverse(), compile=False).raise_if_failed()


# Taps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_taps_as_tensors_agree_with_names_and_have_gradients(mode):
    w = pywt.Wavelet("bior2.2")
    low, high = (torch.tensor(f, dtype=torch.float64) for f in (w.dec_lo, w.dec_hi))
    A, B = DWT2D((7, 6), wavelet=w, level=2, mode=mode), DWT2D((7, 6), wavelet=(low, high), level=2, mode=mode)
    x, y = random(2, 7, 6), random(2, *A.dimsd)
    # with gradients the frames of `_wavelet_taps` are used, without them the banks
    C = DWT2D((7, 6), wavelet=(low.clone().requires_grad_(), high.clone().requires_grad_()), level=2, mode=mode)
    for f, g, h, v in ((A, B, C, x), (A.H, B.H, C.H, y), (A.inverse(), B.inverse(), C.inverse(), y)):
        close(g(v), f(v))
        close(h(v).detach(), f(v))
    close(C.inverse().H(x).detach(), A.inverse().H(x))
    close(C(torch.complex(x, 2 * x)).detach(), A(torch.complex(x, 2 * x)))

    def value(low, high):
        D = DWT((5,), wavelet=(low, high), level=2, mode=mode)
        return D(x[0, 0, :5]), D.H(y[0, 0, :1].expand(D.dimsd))

    assert torch.autograd.gradcheck(value, (low.requires_grad_(), high.requires_grad_()))


def test_taps_can_be_trained():
    w = pywt.Wavelet("db3")
    low, high = (torch.nn.Parameter(torch.tensor(f, dtype=torch.float64)) for f in (w.dec_lo, w.dec_hi))
    A = DWT(32, wavelet=(low, high), level=2)
    assert len(list(A.parameters())) == 2
    x = random(32)
    A.inverse()(A(x)).square().sum().backward()
    assert low.grad is not None and high.grad is not None
    before = A(x).detach()
    with torch.no_grad():
        low.mul_(2)
    assert not torch.allclose(A(x).detach(), before)


def test_gradients_of_the_input():
    A = DWT2D((5, 6), wavelet="bior2.2", level=2, mode="smooth")
    assert torch.autograd.gradcheck(A, random(5, 6).requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: A(x).square(), random(5, 6).requires_grad_())


def test_numba_is_used_where_it_is_installed():
    pytest.importorskip("numba")
    assert compiled.kernels() is not None
    A = DWT2D((128, 128), wavelet="db4")
    assert blocks._Way.of(random(128, 128), A._banks(False)[0]).native


def test_without_numba_torch_computes(monkeypatch):
    monkeypatch.setattr(blocks, "kernels", lambda: None)
    A, x = DWT2D((128, 128), wavelet="haar", level=2), random(128, 128)
    close(A(x), packed(x.numpy(), "haar", "periodization", 2, (0, 1)))
    close(A.H(A(x)), x)


# Errors --------------------------------------------------------------------------------------------------------------


def test_errors_name_the_argument():
    with pytest.raises(ArgumentError, match=r"DWT: wavelet must be one of .* got 'dbb4'; did you mean 'db4'"):
        DWT(8, wavelet="dbb4")
    with pytest.raises(ArgumentError, match="'morl'; it is a continuous wavelet"):
        DWT(8, wavelet="morl")
    with pytest.raises(
        ArgumentError, match="DWT2D: level must be an int from 0 to 3, the maximum for 7 samples; got 4"
    ):
        DWT2D((7, 64), level=4)
    with pytest.raises(ArgumentError, match=r"level must be an int .* got 1\.5"):
        DWT(8, level=1.5)
    with pytest.raises(ArgumentError, match=r"mode must be one of .* got 'symetric'; did you mean 'symmetric'"):
        DWT(8, mode="symetric")
    with pytest.raises(ArgumentError, match=r"axes must lie in \[-2, 1\]"):
        DWTND((8, 8), (0, 2))
    with pytest.raises(ArgumentError, match="axes must be two axes"):
        DWT2D((8, 8), (0,))
    with pytest.raises(ArgumentError, match="axes must be distinct"):
        DWT2D((8, 8), (0, 0))
    with pytest.raises(ArgumentError, match=r"wavelet must be a name, a pywt\.Wavelet, or two filters"):
        DWT(8, wavelet=torch.ones(2))
    with pytest.raises(ArgumentError, match=r"dec_hi must be real taps .* got torch.float64 of shape \(3,\)"):
        DWT(8, wavelet=(torch.ones(2), np.ones(3)))
    with pytest.raises(ArgumentError, match=r"dec_lo must be real taps"):
        DWT(8, wavelet=(torch.ones(3), torch.ones(3)))
    with pytest.raises(ArgumentError, match="the taps do not reconstruct the signal"):
        DWT(8, wavelet=(torch.ones(2), torch.ones(2))).inverse()
    A = DWT2D((8, 8), level=2)
    with pytest.raises(ShapeError, match=r"DWT2D: y must have shape \(..., 8, 8\); got \(8, 7\)"):
        A.split(torch.ones(8, 7))
    with pytest.raises(ArgumentError, match="list of 3 entries, the approximation and 2 levels; got 1"):
        A.pack([torch.ones(2, 2)])
    with pytest.raises(ArgumentError, match=r"coefficients\[1\] must be a tuple of three bands"):
        A.pack([torch.ones(2, 2), torch.ones(2, 2), torch.ones(4, 4)])
    with pytest.raises(ShapeError, match=r"coefficients\[2\] 'da' must have shape \(..., 4, 4\)"):
        A.pack([torch.ones(2, 2), (torch.ones(2, 2),) * 3, (torch.ones(3, 4),) * 3])
    with pytest.raises(ArgumentError, match="must be a dict with keys"):
        DWTND((8, 8)).pack([torch.ones(4, 4), {"ad": torch.ones(4, 4)}])


def test_pywt_missing_is_said(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pywt", None)
    with pytest.raises(ImportError, match="pip install PyWavelets, or give the taps"):
        DWT(8, wavelet="db2")
    DWT(8, wavelet=([1.0, 1.0], [1.0, -1.0]))(torch.ones(8))

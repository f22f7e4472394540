"""y = sum_n u[n] exp(-i (omega_y n_y + omega_x n_x)): the non-uniform Fourier transform, its points being parameters.

n runs over -(N // 2) .. (N - 1) // 2 along each axis. The derivative in a point coordinate is the transform of
-i n u[n]: again an operator of this class. Computed by finufft, on a GPU by cufinufft; plans with sorted points live as
long as the points.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pullback.core.errors import DeviceError
from pullback.core.operator import LinearOperator

# (requested accuracy, oversampling of the FFT grid). Single precision: rounding of the points limits the accuracy on a
# 512 x 512 image to 3e-5 at any setting, and the small grid is 6 times faster than the default of 2 (measured).
_ACCURACY = {torch.complex64: (1e-5, 1.25), torch.complex128: (1e-13, 2.0)}
_MAX_PLANS = 8
_MIN_WORK = 20_000  # points; below this a second thread costs more than it saves

# omega_x -> {settings: plan}. Weak, by identity: plans leave with the tensor of their points.
_plans: Any = WeakIdKeyDictionary()
_plans_lock = threading.Lock()


class _Plan:
    """A plan with its points set. It has a workspace of its own, so one thread at a time may execute it."""

    def __init__(self, plan: Any, omega: tuple[Tensor, Tensor]) -> None:
        self.plan = plan
        self.lock = threading.Lock()
        self.omega_y = weakref.ref(omega[0])
        self.versions = () if omega[0].is_inference() else tuple(w._version for w in omega)

    def fits(self, omega: tuple[Tensor, Tensor]) -> bool:
        return self.omega_y() is omega[0] and self.versions == tuple(w._version for w in omega)

    def __call__(self, data: Any, out: Any) -> None:
        with self.lock:
            self.plan.execute(data, out)


def _plan(kind: int, omega: tuple[Tensor, Tensor], dims: tuple[int, ...], n_batch: int, dtype: torch.dtype) -> _Plan:
    device = omega[1].device
    if device.type == "cuda":
        make, runs_on = _plan_on_gpu, torch.cuda.current_stream(device).cuda_stream
    else:
        make, runs_on = _plan_on_cpu, torch.get_num_threads() if omega[0].numel() * n_batch >= _MIN_WORK else 1
    if any(w.is_inference() for w in omega):  # these do not tell when they are changed
        return make(kind, omega, dims, n_batch, dtype, runs_on)
    key = (kind, dims, n_batch, dtype, runs_on)
    with _plans_lock:
        plans = _plans.setdefault(omega[1], {})
        plan = plans.get(key)
    if plan is None or not plan.fits(omega):
        plan = make(kind, omega, dims, n_batch, dtype, runs_on)
        with _plans_lock:
            if len(plans) >= _MAX_PLANS:
                plans.clear()
            plans[key] = plan
    return plan


def _plan_on_cpu(
    kind: int, omega: tuple[Tensor, Tensor], dims: tuple[int, ...], n_batch: int, dtype: torch.dtype, runs_on: int
) -> _Plan:
    """A plan on `runs_on` threads."""
    import finufft

    eps, oversampling = _ACCURACY[dtype]
    points = [np.ascontiguousarray(w.detach().to(dtype.to_real()).numpy()).reshape(-1) for w in omega]
    plan = finufft.Plan(
        kind, dims, n_batch, eps, 1 if kind == 1 else -1,
        dtype=str(dtype).removeprefix("torch."), nthreads=runs_on, upsampfac=oversampling, showwarn=0,
    )  # fmt: skip
    plan.setpts(*points)
    return _Plan(plan, omega)


def _plan_on_gpu(
    kind: int, omega: tuple[Tensor, Tensor], dims: tuple[int, ...], n_batch: int, dtype: torch.dtype, runs_on: int
) -> _Plan:
    """A plan on a stream of the device of omega. Sorting the points waits for the device; executing it does not."""
    device = omega[1].device
    try:
        cufinufft = importlib.import_module("cufinufft")
    except ImportError as error:  # not installed, or without the CUDA libraries that it was made for
        raise DeviceError(
            f"XRayTransform with method='fourier' needs cufinufft on a CUDA device; got {error}; pip install "
            f"cufinufft, or use method='joseph', or move the operator and the tensor with .to('cpu')"
        ) from None
    if torch.cuda.is_current_stream_capturing():
        raise DeviceError(
            "XRayTransform with method='fourier' cannot be recorded in a CUDA graph, because sorting the points waits "
            "for the device; use method='joseph'"
        )
    points = [w.detach().nan_to_num(0.0, 0.0, 0.0).to(dtype.to_real()).reshape(-1).contiguous() for w in omega]
    plan = cufinufft.Plan(
        kind, dims, n_batch, _ACCURACY[dtype][0], 1 if kind == 1 else -1,
        dtype=str(dtype).removeprefix("torch."), gpu_device_id=device.index, gpu_stream=runs_on,
    )  # fmt: skip
    with torch.cuda.device(device):
        plan.setpts(*points)
    return _Plan(plan, omega)


class _NUFFT(LinearOperator):
    """y = sum_n (-i n_y)^p_y (-i n_x)^p_x u[n] exp(-i (omega_y n_y + omega_x n_x)), complex to complex.

    Args:
        omega_y, omega_x: points [rad per pixel], of any common shape.
        dims: (n_y, n_x) of the image.
        powers: (p_y, p_x), which are not 0 in derivatives only.

    Cost: an FFT of the grid oversampled per axis by 1.25 (single) or 2 (double), plus 7^2 or 14^2 operations a point.
    """

    _has_range_derivatives: ClassVar[bool] = True
    _bridge_live: ClassVar[bool] = True

    def __init__(
        self, omega_y: Tensor, omega_x: Tensor, *, dims: tuple[int, ...], powers: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(dims, tuple(omega_x.shape))
        self.omega_y, self.omega_x = omega_y, omega_x
        self._powers = powers

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return dtype.to_complex()

    def _range_derivative(self, i: int) -> LinearOperator:
        p_y, p_x = self._powers
        return _NUFFT(*self._held(), dims=self.dims, powers=(p_y + (i == 0), p_x + (i == 1)))

    def _expression(self, level: int = 0) -> str:
        return f"XRayTransform({self.extra_repr()})"

    def _forward(self, x: Tensor) -> Tensor:
        return self._transform(2, x if self._powers == (0, 0) else x * self._factor(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        x = self._transform(1, y)
        return x if self._powers == (0, 0) else x * self._factor(x).conj()

    def _factor(self, x: Tensor) -> Tensor:
        (n_y, n_x), (p_y, p_x) = self.dims, self._powers
        rows = (torch.arange(n_y, device=x.device) - n_y // 2).double() ** p_y
        columns = (torch.arange(n_x, device=x.device) - n_x // 2).double() ** p_x
        return ((-1j) ** (p_y + p_x) * (rows[:, None] * columns)).to(x.dtype.to_complex())

    def _transform(self, kind: int, data: Tensor) -> Tensor:
        dims = self.dims if kind == 1 else self.dimsd
        n_in = len(self.dimsd if kind == 1 else self.dims)
        batch, inner = data.shape[: data.ndim - n_in], data.shape[data.ndim - n_in :]
        values = data.detach().resolve_conj().resolve_neg()
        values = values.to(data.dtype.to_complex()).reshape(-1, *inner).contiguous()
        out = torch.empty((len(values), *dims), dtype=values.dtype, device=values.device)
        if len(values):
            (self._on_cpu if values.device.type == "cpu" else self._on_gpu)(kind, values, out)
        return out.reshape(*batch, *dims)

    def _on_cpu(self, kind: int, values: Tensor, out: Tensor) -> None:
        omega = (self.omega_y, self.omega_x)
        if not all(bool(w.isfinite().all()) for w in omega):
            out.fill_(complex(float("nan"), float("nan")))
            return
        source = values.numpy() if kind == 2 else values.numpy().reshape(len(values), -1)
        target = out.numpy() if kind == 1 else out.numpy().reshape(len(values), -1)
        if len(values) == 1:
            source, target = source[0], target[0]
        _plan(kind, omega, self.dims, len(values), values.dtype)(source, target)

    def _on_gpu(self, kind: int, values: Tensor, out: Tensor) -> None:
        if values.device.type != "cuda":
            raise DeviceError(
                f"XRayTransform with method='fourier' runs on the CPU and on CUDA devices; got a tensor on "
                f"{values.device}; move the operator and the tensor with .to('cpu')"
            )
        omega = (self.omega_y, self.omega_x)
        with torch.cuda.device(values.device):
            source = values if kind == 2 else values.reshape(len(values), -1)
            target = out if kind == 1 else out.reshape(len(values), -1)
            _plan(kind, omega, self.dims, len(values), values.dtype)(source, target)
        # The plan has zeros for points that are not finite. Nobody looks, so that nobody waits: 0 or nan is added.
        nothing = (omega[0] * 0 + omega[1] * 0).detach().to(values.dtype.to_real())
        out += nothing if kind == 2 else nothing.sum()

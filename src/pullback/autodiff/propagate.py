"""Propagation of uncertainty: mean, standard deviation and covariance of f(x) for an uncertain x.

First order: mean f(x), covariance J S J^T with J = f'(x). Second order, for Gaussian x and f with Hessians H_k:

    mean_k = f_k + tr(H_k S) / 2,    cov_kl = (J S J^T)_kl + tr(H_k S H_l S) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from pullback.autodiff._covariance import Covariance, covariance
from pullback.core import autograd
from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.core.linearize import Unchanged, private, uses_others
from pullback.core.operator import LinearOperator, Operator
from pullback.linops import MatrixMult

_CHUNK = 1 << 22  # numbers of J, or samples of f, that exist at a time
_DENSE = 1 << 22  # J with at most so many numbers is kept
_SECOND = 1 << 26  # second derivatives that may be kept

Function = Callable[[Tensor], Tensor]  # between flat vectors


def propagate(
    f: Callable[[Any], Tensor], x: Any, cov: Any = None, *, std: Any = None, factor: Any = None, order: int = 1
) -> Propagated:
    """Mean = f(x), cov = J S J^T and std = sqrt(diag(cov)), where S is the covariance of x and J = f'(x).

    Args:
        f: differentiable function of x, whose value is one real tensor. It gets x as it is given.
        x: the expected value: a real tensor, or tuples, lists and dicts of real tensors.
        cov: S, with n = number of elements of x. A number: the *variance* of every element. A tensor of the shape of x:
            their variances. A matrix (n, n), or of shape (*x.shape, *x.shape). A `LinearOperator` on the n elements.
            For several tensors also the same structure holding these forms for each, independent of each other.
        std: standard deviations instead of variances: a number, a tensor of the shape of x, or a structure of them.
        factor: L of shape (n, r) (or (*x.shape, r)) with S = L L^T.
        order: 1, or 2 for mean f + tr(H S) / 2 and variance + tr((H S)^2) / 2, which is exact for quadratic f and
            Gaussian x.

    Returns: a `Propagated`; the standard deviation is computed when it is first asked for.

    Everything is differentiable in x, the covariance and what f closes over; where the variance is zero, std has the
    derivative zero. Symmetry and |S_ij|^2 <= S_ii S_jj are checked, positive definiteness of the whole matrix is not.

    Raises: ArgumentError, ShapeError, DtypeError (complex), DeviceError, NotDifferentiableError.
    Cost: std takes as many products J v as S has columns (n, or r for a factor), or as f has elements products J^T w,
    whichever are fewer; J S J^T is never formed. order=2 takes n^2 (r^2) second derivatives.
    """
    if order not in (1, 2) or isinstance(order, bool):
        raise ArgumentError(f"propagate: order must be 1 or 2; got {order!r}")
    if not callable(f):
        raise ArgumentError(f"propagate: f must be a function of x; got {type(f).__name__}")
    leaves = tree_flatten(x)[0]
    for t in leaves:
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise DtypeError(f"propagate: x must be a real floating point tensor, or several; got {kind}")
        if t.is_complex():
            raise DtypeError(
                f"propagate: x must be real; got {t.dtype}; write f as a function of torch.view_as_real(x), whose "
                f"covariance is that of the real and imaginary parts"
            )
    if not leaves or not all(t.numel() for t in leaves):
        raise ShapeError(f"propagate: x must hold at least one number; got shapes {[tuple(t.shape) for t in leaves]}")
    if len({(t.dtype, t.device) for t in leaves}) > 1:
        raise DtypeError("propagate: the tensors of x must have one dtype and lie on one device")
    return Propagated(f, x, covariance(x, cov, std, factor), order)


class Propagated:
    """The value of a function whose input is uncertain.

    Attributes:
        mean: the expected value, of the shape of f(x).
        variance, std: of every element of f(x).
        cov: the covariance of f(x), a `LinearOperator`; `cov.todense()` is its matrix.
        mode: "forward" if std is made of products J v, "reverse" if of J^T w.
        order: 1 or 2.
    """

    def __init__(self, f: Callable[[Any], Tensor], x: Any, cov: Covariance, order: int) -> None:
        self.order, self.input_cov = order, cov
        leaves, spec = tree_flatten(x)
        shapes = [t.shape for t in leaves]
        self._x = (
            leaves[0].reshape(-1).clone() if len(leaves) == 1 else torch.cat([t.reshape(-1) for t in leaves])
        )  # a copy: x may be changed in place before std is asked for

        def function(v: Tensor) -> Tensor:
            v = private(v)
            parts = v.split([s.numel() for s in shapes]) if len(shapes) > 1 else (v,)
            return f(tree_unflatten([p.reshape(s) for p, s in zip(parts, shapes, strict=True)], spec))

        self._f: Function = lambda v: function(v).reshape(-1)
        self._recorded, value = _evaluate(function, self._x)
        if not isinstance(value, Tensor):
            raise ArgumentError(
                f"propagate: f must return one tensor; got {type(value).__name__}; join several with torch.cat"
            )
        if not value.is_floating_point():
            raise DtypeError(
                f"propagate: f must return a real floating point tensor; got {value.dtype}"
                + ("; return torch.view_as_real(f(x))" if value.is_complex() else "")
            )
        if value.numel() == 0:
            raise ShapeError(f"propagate: f(x) has no elements; got shape {tuple(value.shape)}")
        self._value = value
        self.mode = "forward" if cov.rank <= value.numel() else "reverse"
        if order == 2:
            count = value.numel() * cov.rank**2
            if count > _SECOND:
                raise ArgumentError(
                    f"propagate: order=2 needs {cov.rank} x {cov.rank} second derivatives of {value.numel()} outputs, "
                    f"{count} > {_SECOND} numbers; give factor=L with few columns, propagate a part of the outputs, or "
                    f"use order=1 and .check()"
                )

    @cached_property
    def _products(self) -> _Products:
        if self._recorded is None:
            pull = lambda w: torch.func.vjp(self._f, self._x)[1](w)[0]  # noqa: E731
            return _Products(torch.func.vmap(lambda v: _push(self._f, self._x, v)), torch.func.vmap(pull))
        return _products(*self._recorded, self._value.requires_grad)

    @cached_property
    def _jacobian(self) -> Tensor | None:
        """J^T of shape (n, m), where J has few columns and few elements."""
        n, m = self.input_cov.n, self._value.numel()
        if n > m or n * m > _DENSE:
            return None
        return self._products.push(torch.eye(n, dtype=self._x.dtype, device=self._x.device))

    @cached_property
    def _second(self) -> tuple[Tensor, Tensor]:
        """B_k,ij = u_i^T H_k v_j for the pairs of S, of shape (m, r, r), and its transpose in i, j."""
        U, V = next(self.input_cov.pairs(self._x, self.input_cov.rank))
        W = U if V is None else V
        m, r = self._value.numel(), len(U)
        chunk = max(1, _CHUNK // (m * self.input_cov.n))
        if r <= m:
            step = lambda u, v: _push(lambda y: _push(self._f, y, v), self._x, u)  # noqa: E731
            rows = torch.func.vmap(lambda v: torch.func.vmap(lambda u: step(u, v))(U), chunk_size=chunk)(W)
            B = rows.permute(2, 1, 0)
        else:
            eye = torch.eye(m, dtype=self._x.dtype, device=self._x.device)

            def curvature(e: Tensor, v: Tensor) -> Tensor:
                gradient = lambda y: torch.func.vjp(self._f, y)[1](e)[0]  # noqa: E731
                return torch.func.vjp(gradient, self._x)[1](v)[0]  # H is symmetric

            rows = torch.func.vmap(lambda v: torch.func.vmap(lambda e: curvature(e, v))(eye), chunk_size=chunk)(W)
            B = torch.einsum("jkn,in->kij", rows, U)
        return B, B.mT

    @cached_property
    def mean(self) -> Tensor:
        """The expected value, of the shape of f(x)."""
        if self.order == 1:
            return self._value
        return self._value + self._second[0].diagonal(dim1=1, dim2=2).sum(-1).reshape(self._value.shape) / 2

    @cached_property
    def variance(self) -> Tensor:
        """The variance of every element of f(x)."""
        total = self._variance_forward() if self.mode == "forward" else self._variance_reverse()
        if self.order == 2:
            B, C = self._second
            total = total + (B * C).sum((1, 2)) / 2
        smallest = total.detach()
        if not torch.compiler.is_compiling() and autograd.is_eager(smallest):
            low = float(smallest.amin())
            if low < 0 and low < -1e4 * torch.finfo(total.dtype).eps * float(smallest.abs().amax()) * self.input_cov.n:
                raise ArgumentError(
                    f"propagate: a variance of f(x) came out as {low:.3g}, so cov is not positive semidefinite"
                )
        return total.clamp(min=0).reshape(self._value.shape)

    def _variance_forward(self) -> Tensor:
        S, J = self.input_cov, self._jacobian
        if J is not None and S.factor is None:
            return (J * S.before(J)).sum(0)
        total: Tensor | None = None
        for U, V in S.pairs(self._x, max(1, _CHUNK // self._value.numel())):
            first = self._products.push(U) if J is None else U @ J
            part = (first * (first if V is None else self._products.push(V))).sum(0)
            total = part if total is None else total + part
        assert total is not None, "a covariance without columns; please report"
        return total

    def _variance_reverse(self) -> Tensor:
        m, chunk = self._value.numel(), max(1, _CHUNK // self.input_cov.n)
        parts = []
        for start in range(0, m, chunk):
            stop = min(start + chunk, m)
            units = self._x.new_zeros(stop - start, m)
            units[torch.arange(stop - start), torch.arange(start, stop)] = 1
            rows = self._products.pull(units.to(self._value.dtype))
            if self.input_cov.factor is not None:
                parts.append((rows @ self.input_cov.factor).square().sum(1))
            else:
                parts.append((rows * self.input_cov.times(rows)).sum(1))
        return torch.cat(parts)

    @cached_property
    def std(self) -> Tensor:
        """The standard deviation of every element of f(x)."""
        variance = self.variance
        if not autograd.is_live(variance):
            return variance.sqrt()
        positive = variance > 0
        return torch.where(positive, variance, 1.0).sqrt() * positive  # the root has no derivative at zero

    @cached_property
    def cov(self) -> LinearOperator:
        """The covariance of f(x) as an operator on tensors of its shape."""
        S = self.input_cov.as_operator()
        dims = tuple(self._value.shape) or (1,)
        J: LinearOperator
        if self._jacobian is not None:
            J = MatrixMult(self._jacobian.mT)
        else:
            J = _Map(self._f, self.input_cov.n, self._value.numel()).linearize(self._x)
        total = J @ S @ J.H
        if self.order == 2:
            B, C = (MatrixMult(t.reshape(t.shape[0], -1)) for t in self._second)
            total = total + 0.5 * (B @ C.H)
        return _Shaped(total, dims) if dims != total.dims else total

    def band(self, k: float = 2.0) -> tuple[Tensor, Tensor]:
        """(mean - k std, mean + k std)."""
        return self.mean - k * self.std, self.mean + k * self.std

    def plot(self, t: Any = None, *, k: float = 2.0, ax: Any = None) -> Any:
        """Draw the mean and the band of k standard deviations over t, if f(x) has one axis; returns the axes.

        Args:
            t: where the elements of f(x) lie; their numbers if None.
            k: half width of the band.
            ax: matplotlib axes; the current ones if None.
        """
        if self._value.ndim != 1:
            raise ShapeError(f"plot draws values with one axis; f(x) has shape {tuple(self._value.shape)}; use band()")
        import matplotlib.pyplot as plt

        ax = plt.gca() if ax is None else ax
        low, high = (b.detach().cpu() for b in self.band(k))
        t = torch.arange(len(low)) if t is None else torch.as_tensor(t).detach().cpu()
        (line,) = ax.plot(t, self.mean.detach().cpu())
        ax.fill_between(t, low, high, color=line.get_color(), alpha=0.25, linewidth=0, label=f"{k:g} std")
        return ax

    def check(self, n: int = 10_000, seed: int = 0) -> MonteCarlo:
        """Compare with n samples f(x + L z), z Gaussian: how far mean and std are from theirs, in standard errors.

        Args:
            n: number of samples, at least 2. They are evaluated by `torch.func.vmap`.
            seed: of the random numbers.

        Differences of a few standard errors are chance; more of them mean that f is not close to linear (quadratic,
        for order 2) over the spread of x.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 2:
            raise ArgumentError(f"check: n must be an int >= 2; got {n!r}")
        x, root = self._x.detach(), self.input_cov.root().detach()
        generator = torch.Generator(device=x.device).manual_seed(seed)
        draws = torch.randn(n, root.shape[-1], dtype=x.dtype, device=x.device, generator=generator)
        shifts = draws * root if root.ndim == 1 else draws @ root.mT
        chunk = max(1, _CHUNK // max(self.input_cov.n, self._value.numel()))
        with torch.no_grad():
            try:
                y = torch.func.vmap(self._f, chunk_size=chunk)(x + shifts).to(torch.float64)
            except RuntimeError as error:
                if "random operation" not in str(error):
                    raise
                raise ArgumentError("check: f must be deterministic, but draws random numbers; use eval()") from error
            mean, centred = y.mean(0), y - y.mean(0)
            variance, fourth = centred.square().mean(0), centred.pow(4).mean(0)
            std = variance.sqrt()
            mean_error = std / math.sqrt(n)
            std_error = ((fourth - variance.square()).clamp(min=0) / n).sqrt() / (2 * std)
            scale = 1e3 * torch.finfo(x.dtype).eps * (y.abs().amax(0) + torch.finfo(x.dtype).tiny)
            gaps = [
                (ours.detach().reshape(-1).to(torch.float64) - theirs).abs() / torch.maximum(error.nan_to_num(), scale)
                for ours, theirs, error in ((self.mean, mean, mean_error), (self.std, std, std_error))
            ]
        shape = self._value.shape
        return MonteCarlo(n, *(t.reshape(shape) for t in (mean, std, *gaps)))

    def __repr__(self) -> str:
        shape = "x".join(map(str, self._value.shape)) or "number"
        return (
            f"<Propagated: {self.input_cov.n} inputs -> {shape}, order {self.order}, std by {self.mode} mode "
            f"({min(self.input_cov.rank, self._value.numel())} products)>"
        )


@dataclass(frozen=True)
class MonteCarlo:
    """A comparison with samples; the last two say how far off, in standard errors of the sampled numbers."""

    n: int
    mean: Tensor
    std: Tensor
    mean_gap: Tensor
    std_gap: Tensor

    def __str__(self) -> str:
        rows = [f"{self.n} samples; difference in standard errors (median, largest):"]
        for name, gap in (("mean", self.mean_gap), ("std", self.std_gap)):
            rows.append(f"  {name:5}{float(gap.median()):8.2f}{float(gap.amax()):8.2f}")
        return "\n".join(rows)

    __repr__ = __str__


# Products with J -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Products:
    """push: rows v -> rows J v; pull: rows w -> rows J^T w."""

    push: Function
    pull: Function


def _evaluate(f: Callable[[Tensor], Any], x: Tensor) -> tuple[tuple[Tensor, Tensor] | None, Any]:
    """(x, f(x)) with the graph between them, or None while somebody traces or transforms; and f(x) for the user."""
    if torch.compiler.is_compiling() or autograd.transforms_active() or forward_ad.unpack_dual(x).tangent is not None:
        return None, f(x)
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone() if x.is_inference() else x
        point = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        with Unchanged("propagate", (point,)):
            y = f(point)
        flat = y.reshape(-1) if isinstance(y, Tensor) else None
    if flat is None or not y.is_floating_point():
        return None, y  # refused by the caller
    if not y.requires_grad:
        raise NotDifferentiableError(
            "propagate: autograd sees no way from f(x) to x; write f in torch without detach(), .item(), .numpy() and "
            "torch.no_grad()"
        )
    live = torch.is_grad_enabled() and (x.requires_grad or uses_others(y, point))
    return (point, flat), y if live else y.detach()


def _products(point: Tensor, y: Tensor, live: bool) -> _Products:
    """The products, from the graph between the point and y."""
    with torch.inference_mode(False):
        seed = torch.zeros_like(y, requires_grad=True)
    pulled: list[Tensor] = []

    def push(rows: Tensor) -> Tensor:
        if not pulled:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
            ):  # J^T w as a function of w; its transpose is v -> J v
                pulled.append(torch.autograd.grad(y, point, seed, create_graph=True)[0])
        if not pulled[0].requires_grad:
            return y.new_zeros(len(rows), y.numel())
        return _rows(pulled[0], seed, rows, live)

    return _Products(push, lambda rows: _rows(y, point, rows, live))


def _rows(out: Tensor, point: Tensor, rows: Tensor, live: bool) -> Tensor:
    """(d out / d point)^T of every row."""

    def grad(g: Tensor, batched: bool) -> Tensor:
        return torch.autograd.grad(
            out,
            point,
            g,
            retain_graph=True,
            create_graph=live,
            allow_unused=True,
            materialize_grads=True,
            is_grads_batched=batched,
        )[0]

    live = (live or rows.requires_grad) and torch.is_grad_enabled()
    if len(rows) > 4:  # below, one after the other is as fast
        try:
            return grad(rows, True)
        except RuntimeError:  # an operation without a rule for batches; one that is not differentiable fails again
            pass
    return torch.stack([grad(g, False) for g in rows])


def _push(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """J v by reverse mode twice: forward mode cannot be nested in everything (pytorch#197867)."""
    y, pull, *_ = torch.func.vjp(f, x)
    return torch.func.vjp(lambda g: pull(g)[0], torch.zeros_like(y))[1](v)[0]


class _Map(Operator):
    """A function of a flat vector as an operator, so that it can be linearised."""

    def __init__(self, f: Function, n: int, m: int) -> None:
        super().__init__(n, m)
        self.f = f

    def _forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class _Shaped(LinearOperator):
    """A symmetric operator on flat vectors, on tensors of a shape."""

    def __init__(self, op: LinearOperator, dims: tuple[int, ...]) -> None:
        super().__init__(dims, dims)
        self.op = op
        self.__dict__["_delegates"] = True

    def _forward(self, x: Tensor) -> Tensor:
        n = len(self.dims)
        return self.op._run(x.reshape(*x.shape[: x.ndim - n], *self.op.dims)).reshape(x.shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)

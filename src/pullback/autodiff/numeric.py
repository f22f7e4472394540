"""Derivatives from values alone, with error bars: what every other derivative can be compared with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError

Function = Callable[..., Any]
_EPS = torch.finfo(torch.float64).eps
_SINGLE = torch.finfo(torch.float32).eps
_RATIO = 1.6  # between the steps of the extrapolation
_LEVELS = 10  # steps of the extrapolation
_SPREAD = 0.05  # the largest step, relative to the size of x along the direction
_TINY_STEP = 1e-30  # of the complex step: its square vanishes against 1
_BATCH = 1 << 22  # numbers of perturbed inputs evaluated at once


@dataclass(frozen=True)
class NumericDerivative:
    """A derivative and how far off it may be. Made by `numeric_derivative`.

    Attributes:
        value: the derivative: a tensor, or a tree of tensors as f returns or takes.
        error: its error bar, of the same structure, real: an estimate, not a bound.
        method: how it was computed.
    """

    value: Any
    error: Any
    method: str = field(default="")


def numeric_derivative(
    f: Function,
    x: Any,
    v: Any = None,
    *,
    method: str = "richardson",
    step: float | None = None,
    rounding: float = _EPS,
) -> NumericDerivative:
    """df(x)[v], or with v = None the full derivative of f at x, from values of f, with an error bar.

    Args:
        f: a function of one tensor, or of one tree (dict, list, tuple) of tensors, to a tensor or a tree of tensors.
        x: where: real or complex tensors of any shape (0-d too), or floats. float32 and narrower are computed in
            float64, so f must work in float64 (a module: `module.double()`).
        v: a direction, like x: the result is the derivative of f(x + t v) in t at 0. None: all directions. (In complex
            x these are the directions 1 and i; the derivative is written for a holomorphic f, and refused otherwise.)
        method: "central": (f(x + hv) - f(x - hv)) / 2h with one step, error about 1e-10; its bar compares with 2h.
            "richardson": central differences with shrinking steps, extrapolated to h = 0, error about 1e-13, and the
            best error bar. "complex": Im f(x + ihv) / h with h = 1e-30: exact to rounding, one evaluation; for real x
            and f that is real there and made of analytic operations (no abs, no comparisons, no conj).
        step: the step h of "central", the largest step of "richardson", in units of v. By default rounding^(1/3), and
            0.05, times the size of x along v (1 for x = 0). "richardson" compares with steps of rounding^(1/2) and goes
            over to small ones where those disagree; what f does within less than that is not seen, nor, with a given
            step, within 1/70 of it.
        rounding: the relative rounding error of f: 1.2e-7 if f computes in float32 inside, more if it is noisy.

    Returns: a NumericDerivative. Shapes of `.value`: those of f(x) with v; without v (*f(x).shape, *x.shape), which is
        that of x if f(x) is a 0-d tensor.

    Raises: NotDifferentiableError ("complex", f not analytic or not real). ArgumentError, ShapeError, DtypeError.

    Cost: with v 4, 24 (46 where f changes fast), or 5 evaluations of f; without v for each number of x, batched by
        vmap if f allows.

    Source: Ridders 1982, doi:10.1016/S0141-1195(82)80057-0; Squire and Trapp 1998, doi:10.1137/S003614459631241X.
    """
    if not callable(f):
        raise ArgumentError(f"numeric_derivative: f must be a function; got {type(f).__name__}")
    if method not in _METHODS:
        raise ArgumentError(f"numeric_derivative: method must be one of {', '.join(_METHODS)}; got {method!r}")
    if step is not None and (not isinstance(step, (int, float)) or not 0 < step < math.inf):
        raise ArgumentError(f"numeric_derivative: step must be a positive number; got {step!r}")
    if step is not None and method == "complex":
        raise ArgumentError('numeric_derivative: method "complex" has no step to choose; leave step=None')
    if not isinstance(rounding, float) or not 0 < rounding < 1:
        raise ArgumentError(f"numeric_derivative: rounding must be a number between 0 and 1; got {rounding!r}")
    leaves, spec = tree_flatten(x)
    points = [_point(t) for t in leaves]
    flat = _Flat(f, points, spec, rounding)
    if v is not None:
        directions, other = tree_flatten(v)
        if len(directions) != len(points):
            raise ShapeError(f"v must have the structure of x, {spec}; got {other}")
        direction = flat.pack([_direction(d, p) for d, p in zip(directions, points, strict=True)])
        value, error = _METHODS[method](flat, direction[None], step)
        return NumericDerivative(flat.result(value[0]), flat.result(error[0]), method)
    if flat.n == 0:
        raise ShapeError("numeric_derivative: x has no numbers")
    parts = [_METHODS[method](flat, block, step) for block in flat.units()]
    value, error = (torch.cat(p) for p in zip(*parts, strict=True))
    if any(p.is_complex() for p in points):
        value, error = flat.holomorphic(value, error)
    return NumericDerivative(flat.jacobian(value), flat.jacobian(error), method)


class _Flat:
    """f as a function of one real vector, evaluated at many points at once."""

    def __init__(self, f: Function, points: list[Tensor], spec: Any, rounding: float) -> None:
        self.f, self.points, self.spec, self.rounding = f, points, spec, rounding
        self.base = self.pack(points)
        self.n = len(self.base)
        self.out_spec: Any = None
        self.out: list[Tensor] = []
        self.batchable = True
        self.value = self.evaluate(self.base[None].clone())[0]  # a copy: f may write into its argument

    @staticmethod
    def pack(tensors: list[Tensor]) -> Tensor:
        """The numbers of all tensors; a complex one is two."""
        parts = [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(-1) for t in tensors]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def unpack(self, vector: Tensor) -> Any:
        """The tree of tensors that a vector stands for; a complex vector perturbs real tensors."""
        made, start = [], 0
        for p in self.points:
            count = p.numel() * (2 if p.is_complex() else 1)
            part = vector[start : start + count]
            start += count
            made.append(torch.view_as_complex(part.reshape(*p.shape, 2)) if p.is_complex() else part.reshape(p.shape))
        return tree_unflatten(made, self.spec)

    def one(self, vector: Tensor) -> Tensor:
        """All numbers of f at one vector."""
        out, self.out_spec = tree_flatten(self.f(self.unpack(vector)))
        for t in out:
            if not isinstance(t, Tensor):
                raise ArgumentError(f"f must return tensors; got {type(t).__name__}; wrap numbers with torch.tensor")
            if not (t.is_floating_point() or t.is_complex()):
                raise NotDifferentiableError(f"f returns {t.dtype}, which has no derivative")
        self.out = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in out]
        wide = torch.complex128 if any(t.is_complex() for t in out) else torch.float64
        return torch.cat([t.reshape(-1).to(wide) for t in out]) if out else vector.new_zeros(0)

    def evaluate(self, vectors: Tensor) -> Tensor:
        """(k, numbers of f) for (k, n); by vmap, or one after the other if f does not allow that."""
        with torch.no_grad():
            if self.batchable and len(vectors) > 4:
                with contextlib.suppress(Exception):  # whatever goes wrong in a batch is done, or raised, one by one
                    return torch.func.vmap(self.one)(vectors)
                self.batchable = False
            return torch.stack([self.one(row) for row in vectors])

    def units(self) -> list[Tensor]:
        """Unit vectors in blocks (k, n)."""
        k = max(1, _BATCH // max(self.n * 2 * _LEVELS, 1))
        eye = torch.eye(self.n, dtype=self.base.dtype, device=self.base.device)
        return list(eye.split(k))

    def result(self, numbers: Tensor) -> Any:
        """What f returns, from its numbers."""
        parts = numbers.split([t.numel() for t in self.out])
        shaped = [_like(p, t).reshape(t.shape) for p, t in zip(parts, self.out, strict=True)]
        return tree_unflatten(shaped, self.out_spec)

    def jacobian(self, rows: Tensor) -> Any:
        """(n, numbers of f) as tensors (*f.shape, *x.shape), nested as f's result, then as x."""
        sizes = [p.numel() for p in self.points]

        def block(part: Tensor, t: Tensor) -> Any:
            pieces = zip(part.split(sizes, 1), self.points, strict=True)
            return tree_unflatten([_like(b, t).reshape((*t.shape, *p.shape)) for b, p in pieces], self.spec)

        parts = rows.T.split([t.numel() for t in self.out])
        return tree_unflatten([block(p, t) for p, t in zip(parts, self.out, strict=True)], self.out_spec)

    def holomorphic(self, value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """df/dz from the derivatives along 1 and i, which must be i times the former."""
        keep, start = [], 0
        for p in self.points:
            count = p.numel()
            if p.is_complex():
                real, imaginary = start + 2 * torch.arange(count), start + 2 * torch.arange(count) + 1
                gap = (value[imaginary] - 1j * value[real]).abs()
                scale = value[real].abs().max() if count else 0.0
                if bool((gap > 1e-6 * scale + 10 * (error[imaginary] + error[real])).any()):
                    raise NotDifferentiableError(
                        "f is not holomorphic, so it has no complex derivative: give a direction v, or write f as a "
                        "function of torch.view_as_real(x)"
                    )
                keep.append(real)
            else:
                keep.append(start + torch.arange(count))
            start += count * (2 if p.is_complex() else 1)
        rows = torch.cat(keep)
        return value[rows], error[rows]


def _steps(flat: _Flat, directions: Tensor) -> Tensor:
    """(k, 1): how far one can go along each direction until x changes by as much as its size there (1 for x = 0)."""
    reach = torch.where(directions != 0, flat.base.abs(), 0.0).amax(1)
    reach = torch.where(reach > 0, reach, 1.0)
    return (reach / directions.abs().amax(1).clamp(min=1e-300))[:, None]


def _differences(flat: _Flat, directions: Tensor, h: Tensor) -> Tensor:
    """(f(x + hv) - f(x - hv)) / 2h for every direction."""
    pairs = torch.cat([flat.base + h * directions, flat.base - h * directions])
    plus, minus = flat.evaluate(pairs).chunk(2)
    return (plus - minus) / (2 * h)


def _noise(flat: _Flat, directions: Tensor, h: Tensor, slope: Tensor) -> Tensor:
    """The rounding error of a central difference with the step h: of f, and of x times the slope."""
    return flat.rounding * (flat.value.abs() + slope.abs() * _steps(flat, directions)) / h


def _central(flat: _Flat, directions: Tensor, step: float | None) -> tuple[Tensor, Tensor]:
    h = (
        _steps(flat, directions) * flat.rounding ** (1 / 3)
        if step is None
        else torch.full_like(directions[:, :1], step)
    )
    fine, coarse = _differences(flat, directions, h), _differences(flat, directions, 2 * h)
    # The error of the finer one is a third of their difference, if h^2 dominates.
    return fine, (fine - coarse).abs() + 4 * _noise(flat, directions, h, fine)


def _richardson(flat: _Flat, directions: Tensor, step: float | None) -> tuple[Tensor, Tensor]:
    """Extrapolation from steps near the size of x, unless differences with tiny steps contradict it.

    Where f changes within less than the smallest step (sin(x) at 1e5, a pole or a kink nearby), the large steps agree
    with each other on something else than the derivative.
    """
    if step is not None:
        return _extrapolated(flat, directions, torch.full_like(directions[:, :1], step))
    length = _steps(flat, directions)
    value, error = _extrapolated(flat, directions, length * _SPREAD)
    # Tiny steps need to know if f computes in single precision, whether or not `rounding` says so.
    rounding = max(flat.rounding, _SINGLE) if _is_single(flat.value) else flat.rounding
    h = length * math.sqrt(rounding)
    near = _differences(flat, directions, h)
    noise = _noise(flat, directions, h, near) * (rounding / flat.rounding)
    doubt = 10 * ((_differences(flat, directions, 2 * h) - near).abs() + 4 * noise)
    off = ~((near - value).abs() <= error + doubt) & near.isfinite()
    if not off.any():
        return value, error
    h = length * rounding**0.3
    off &= (near != 0) | (_differences(flat, directions, h) == 0)  # else f moves in jumps, as in lower precision
    fine, bar = _extrapolated(flat, directions, h)
    agrees = (fine - near).abs() <= bar + doubt
    least = torch.where(agrees, 10 * bar, doubt)
    fine, bar = torch.where(agrees, fine, near), torch.where(agrees, bar, doubt)
    off &= ((fine - value).abs() > least) | ~value.isfinite()  # else f is noisy, and large steps are better
    return torch.where(off, fine, value), torch.where(off, bar, error)


def _is_single(values: Tensor) -> bool:
    """Whether numbers, zero aside, look as if they were computed in single precision."""
    numbers = torch.view_as_real(values) if values.is_complex() else values
    return bool((numbers.float() == numbers).all() and numbers.any())


def _extrapolated(flat: _Flat, directions: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Ridders' table: column k of row i removes the terms h^2 ... h^2k; the entry whose neighbours agree best wins."""
    best = error = None
    row: list[Tensor] = []
    for _ in range(_LEVELS):
        new = [_differences(flat, directions, h)]
        noise = _noise(flat, directions, h, new[0])
        for k, old in enumerate(row):
            factor = _RATIO ** (2 * (k + 1))
            new.append((new[k] * factor - old) / (factor - 1))
            # An entry is as far off as it differs from those that it was made of, or as its values are rounded.
            gap = torch.maximum((new[k + 1] - new[k]).abs(), (new[k + 1] - old).abs()) + 4 * noise
            gap = torch.where(gap.isnan(), torch.inf, gap)
            if best is None or error is None:
                best, error = new[k + 1], gap
            else:
                better = gap < error
                best, error = torch.where(better, new[k + 1], best), torch.where(better, gap, error)
        row = new
        h = h / _RATIO
    assert best is not None and error is not None, "no level was computed; please report"
    return best, error


def _complex(flat: _Flat, directions: Tensor, step: float | None) -> tuple[Tensor, Tensor]:
    if any(p.is_complex() for p in flat.points):
        raise DtypeError('numeric_derivative: method "complex" is for real x; use method="richardson"')
    if flat.value.is_complex():
        raise NotDifferentiableError(
            'numeric_derivative: method "complex" is for real f; f returns complex numbers; use method="richardson"'
        )
    refusal = (
        'numeric_derivative: method "complex" needs an f made of analytic operations, but {}: it uses abs, a norm, '
        "conj, .real, a comparison, a real-only operation, or x ** k (through logarithms: write products); "
        'use method="richardson"'
    )
    h = _TINY_STEP * _steps(flat, directions)
    try:
        out = flat.evaluate(torch.complex(flat.base.expand_as(directions), h * directions))
    except (RuntimeError, TypeError, ValueError) as reason:
        raise NotDifferentiableError(refusal.format(f"f(x + ih v) fails ({str(reason).splitlines()[0]})")) from None
    if not out.is_complex():
        raise NotDifferentiableError(refusal.format("f(x + ih v) is real"))
    value = out.imag / h
    # The real part is f, and the derivative that of differences, or the operations are not analytic.
    scale = flat.value.abs().max() if flat.value.numel() else torch.tensor(0.0)
    if not torch.allclose(
        out.real, flat.value.expand_as(out.real), rtol=1e-9, atol=float(1e-9 * scale), equal_nan=True
    ):
        raise NotDifferentiableError(refusal.format("f(x + ih v) is not near f(x)"))
    rough, bar = _central(flat, directions, None)
    size = torch.maximum(rough.abs(), value.abs())
    if bool(((value - rough).abs() > 1e-4 * size + 100 * bar).any()):
        raise NotDifferentiableError(refusal.format("Im f(x + ih v) / h differs from differences of f"))
    return value, 8 * _EPS * (value.abs() + flat.value.abs() / _steps(flat, directions))


_METHODS: dict[str, Callable[[_Flat, Tensor, float | None], tuple[Tensor, Tensor]]] = {
    "central": _central,
    "richardson": _richardson,
    "complex": _complex,
}


def _point(t: Any) -> Tensor:
    """A leaf of x as a tensor in double precision."""
    if isinstance(t, bool) or not isinstance(t, (Tensor, float, int)):
        raise ArgumentError(f"numeric_derivative: x must be a tensor or a tree of tensors; got {type(t).__name__}")
    t = t.detach() if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
    if not (t.is_floating_point() or t.is_complex()):
        raise DtypeError(f"numeric_derivative: x must be floating point or complex; got {t.dtype}; use x.double()")
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def _direction(d: Any, p: Tensor) -> Tensor:
    d = _point(d)
    if d.shape != p.shape:
        raise ShapeError(f"v must have the shape of x, {tuple(p.shape)}; got {tuple(d.shape)}")
    if d.is_complex() and not p.is_complex():
        raise DtypeError("v must be real where x is; got a complex direction")
    return d.to(p.dtype)


def _like(numbers: Tensor, t: Tensor) -> Tensor:
    """Real numbers where f is real: a complex neighbour in the tree made all of them complex."""
    return numbers.real if numbers.is_complex() and not t.is_complex() else numbers

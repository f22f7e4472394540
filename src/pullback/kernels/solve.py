"""Kernel systems (alpha I + K) x = b, differentiable to every order in b, alpha and the kernel."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pullback.kernels.fast.run as run
import pullback.kernels.formula as language
from pullback.core import interop, maps
from pullback.core.autograd import constant_in_graphs
from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.core.shapes import real_of
from pullback.kernels.conjugate import Apply, ConvergenceWarning, Options, conjugate_gradients
from pullback.kernels.ir.expr import PARAMETER, Expr, variable, walk
from pullback.kernels.ir.expr import I as ROW
from pullback.kernels.ir.expr import J as COLUMN
from pullback.kernels.lazy_base import LazyBase, make
from pullback.kernels.lazy_data import from_pairs, to_pairs
from pullback.kernels.lazy_expr import number_of, numbered, renumber, shelf, shelve, swap_roles
from pullback.kernels.operator import LinearForm, form_of
from pullback.kernels.plan.ranges import Ranges, as_ranges
from pullback.kernels.precondition import preconditioner
from pullback.kernels.reduce import Reducer
from pullback.kernels.task import event_rank, task, within

_watch = threading.local()  # .found: a list that receives the SolveInfo of the solves in this thread


class System(maps.Map):
    """x = (alpha I + K)^-1 b as a `core.maps.Map` of (b, alpha, tensors of K): its derivatives are again solves.

    For x = A^-1 b with A symmetric: dx = A^-1 (db - dA x), so one more solve w = A^-1 g gives all gradients: w for b,
    -<w, x> for alpha, and those of -<w, K x> with w and x fixed for the tensors. Each is accurate to about the
    tolerance of the solve times the condition number.
    """

    def __init__(self, form: LinearForm, options: Options, ranges: Ranges | None) -> None:
        self.form, self.options, self.ranges = form, options, ranges
        self.key = f"kernel solve:{id(self)}:{form.expr}"
        self._events = (2, 0, *(event_rank(category) for _, category in form.signature))
        maps.register(self)

    def event(self) -> tuple[int, ...]:
        """How many trailing axes of each tensor are not batch."""
        return self._events

    def _batch(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        shapes = [t.shape[: t.ndim - k] for t, k in zip(tensors, self._events, strict=True)]
        return tuple(torch.broadcast_shapes(*shapes))

    def fake(self, tensors: Sequence[Tensor]) -> Tensor:
        """An empty tensor like the result."""
        return tensors[0].new_empty((*self._batch(tensors), *tensors[0].shape[-2:]))

    def evaluate(self, tensors: Sequence[Tensor]) -> Tensor:
        """The numbers: conjugate gradients."""
        b, alpha, *args = tensors
        b = b.expand(*self._batch(tensors), *b.shape[-2:])
        alpha = alpha[..., None, None].to(b.dtype)
        product: Apply = lambda v: self.form.product(args, v, False, self.ranges, self.options.backend)  # noqa: E731

        def beside(v: Tensor) -> Tensor:
            """K v, to which alpha v will be added: a tolerance is one of the sum."""
            with run.beside((alpha * v).square().sum((-2, -1)).sqrt()):
                return product(v)

        with torch.no_grad():
            inverse = preconditioner(self.form, self.ranges, self.options, product, b, alpha, args)
            x, info = conjugate_gradients(beside, b, alpha, inverse, self.options, self.form.unit_in)
        if hasattr(_watch, "found"):
            _watch.found.append(info)
        if not bool(info.converged.all()):
            warnings.warn(info.message, ConvergenceWarning, stacklevel=2)
        return x

    def pullback(
        self, tensors: Sequence[Tensor], out: Tensor, g: Tensor, wanted: Sequence[int]
    ) -> Sequence[Tensor | None]:
        """Gradients in the tensors numbered `wanted`, with one more solve."""
        b, alpha, *args = tensors
        w = maps.call(self, [g, alpha, *args])
        found: dict[int, Tensor] = {}
        if 0 in wanted:
            found[0] = w.sum_to_size(b.shape)
        if 1 in wanted:
            found[1] = -(w * out).sum((-2, -1)).sum_to_size(alpha.shape).to(alpha.dtype)
        own = [k - 2 for k in wanted if k >= 2]
        if own:
            pieces = zip(
                self.form.programs(out, False), self.form.pieces(out, False), self.form.pieces(w, False), strict=True
            )
            for program, x_part, w_part in pieces:
                one = task(program, self.ranges, self.options.backend)
                for k, grad in zip(own, one.pullback([*args, x_part], x_part, w_part, own), strict=True):
                    if grad is not None:
                        found[k + 2] = found[k + 2] - grad if k + 2 in found else -grad
        return [found.get(k) for k in wanted]

    def pushforward(self, tensors: Sequence[Tensor], out: Tensor, tangents: Sequence[Tensor | None]) -> Tensor | None:
        """The tangent dx = A^-1 (db - d alpha x - dK x), with one more solve."""
        _, alpha, *args = tensors
        db, dalpha, *dargs = tangents
        right: Tensor | None = db
        terms: list[Tensor] = [] if dalpha is None else [dalpha[..., None, None] * out]
        if any(d is not None for d in dargs):
            parts = []
            for program, x_part in zip(self.form.programs(out, False), self.form.pieces(out, False), strict=True):
                one = task(program, self.ranges, self.options.backend)
                push = one.pushforward([*args, x_part], x_part, [*dargs, None])
                parts.append(torch.zeros_like(x_part) if push is None else push)
            terms.append(torch.cat(parts, -1))
        for term in terms:
            right = -term if right is None else right - term
        return None if right is None else maps.call(self, [right, alpha, *args])


@lru_cache(maxsize=256)
def _system(form: LinearForm, options: Options) -> System:
    return System(form, options, None)


@constant_in_graphs
def _traced_system(expr: int, form: Any, options: Any) -> str:
    return shelve(_system(LinearForm(numbered(expr), *form), Options(*options)))


# Front doors ------------------------------------------------------------------------------------------------------


def _options(options: dict[str, Any]) -> tuple[Options, bool]:
    """Options from keyword arguments, and whether the SolveInfo is wanted."""
    rtol = options.pop("rtol", None)
    if rtol is not None:
        options["eps"] = rtol
    info = bool(options.pop("info", False))
    for name in ("device_id", "call", "dtype_acc", "use_double_acc", "sum_scheme", "enable_chunks", "use_fast_math"):
        options.pop(name, None)
    options["backend"] = within(options.pop("tolerance", None), options.get("backend"))
    try:
        return Options(**options), info
    except TypeError:
        unknown = sorted(set(options) - set(Options.__dataclass_fields__))
        raise ArgumentError(
            f"solve: unknown argument {unknown[0]!r}; known are {', '.join(Options.__dataclass_fields__)}, rtol, info"
        ) from None


def _solve(
    form: LinearForm, options: Options, ranges: Ranges | None, b: Tensor, alpha: Any, args: Sequence[Tensor], info: bool
) -> Any:
    """x, or (x, SolveInfo)."""
    if not isinstance(alpha, Tensor):
        if not isinstance(alpha, (int, float, np.number)):
            raise DtypeError(f"solve: alpha must be a number or a tensor; got {type(alpha).__name__}")
        alpha = torch.full((), float(alpha), dtype=b.dtype, device=b.device)
    if alpha.is_complex():
        raise DtypeError(f"solve: alpha must be real; got {alpha.dtype}")
    if torch.compiler.is_compiling():
        if ranges is not None or info or form.mode == "linear":
            raise ArgumentError("solve: ranges, info and vector-valued formulas are not possible inside torch.compile")
        numbers = (form.signature, form.mode, form.unit_in, form.unit_out, form.accumulator, form.scheme)
        settings = (options.eps, options.atol, options.maxiter, options.preconditioner, options.rank, options.backend)
        system = getattr(shelf, _traced_system(number_of(form.expr), numbers, settings))
    else:
        system = _system(form, options) if ranges is None else System(form, options, ranges)
    if not info:
        return maps.call(system, [b, alpha, *args])
    _watch.found = []
    try:
        x = maps.call(system, [b, alpha, *args])
        return x, _watch.found[0]
    finally:
        del _watch.found


def solve_lazy(lazy: Any, other: Any, var: Any, alpha: Any, ranges: Any = None, **kwargs: Any) -> Any:
    """`LazyTensor.solve`: (alpha I + K)^-1 b for a LazyTensor K and data b of shape (n,) or (..., n, p)."""
    options, info = _options({"backend": lazy.backend, **kwargs})
    if isinstance(other, LazyBase):  # KeOps writes Vi(b)
        if other._expr.op != "Var" or other._expr.params[1] == PARAMETER:
            raise ArgumentError("solve: b must be a tensor, or a variable Vi(b) of data")
        other = other._domain.leaves[0].source
        other = other.squeeze(-2) if other.ndim > 2 and other.shape[-2] == 1 else other
    if var is not None and var._domain.leaves and var._domain.leaves[0].category == ROW:
        lazy, var = _transposed(lazy), _transposed(var)
    form, domain = form_of(lazy, var)
    m, n = domain.pairs[-2:]
    if m != n or form.unit_in != form.unit_out:
        raise ShapeError(f"solve: the kernel must be square; got a LazyTensor of shape {lazy.shape}")
    is_array = isinstance(other, np.ndarray)
    b = interop.share(other, "solve: b") if is_array else other
    if not isinstance(b, Tensor):
        raise DtypeError(f"solve: b must be a tensor or an array; got {type(other).__name__}")
    flat = b.ndim == 1
    b = b.unsqueeze(-1) if flat else b
    if b.ndim < 2 or b.shape[-2] != n or (form.mode == "linear" and b.shape[-1] % form.unit_in):
        width = "p" if form.mode != "linear" else form.unit_in
        raise ShapeError(f"solve: b must have shape ({n},) or (..., {n}, {width}); got {tuple(other.shape)}")
    if real_of(b.dtype) != domain.real_dtype:
        raise DtypeError(f"solve: b is {b.dtype}, the kernel {domain.real_dtype}; convert one of them")
    pairs = b.is_complex() or form.mode == "complex"
    if pairs:
        b = to_pairs(b if b.is_complex() else torch.complex(b, torch.zeros_like(b)))
    pattern = as_ranges(lazy._ranges if ranges is None else ranges, n, n)
    found = _solve(form, options, pattern, b, alpha, domain.args(), info)
    x = found[0] if info else found
    x = from_pairs(x) if pairs else x
    x = x.squeeze(-1) if flat else x
    x = x.detach().numpy() if is_array else x
    return (x, found[1]) if info else x


def _transposed(lazy: Any) -> Any:
    return make(swap_roles(lazy._expr), lazy, lazy._domain.swapped(), lazy._complex)


class KernelSolve:
    """x with alpha x_i + sum_j F_ij(x_j) = b_i, for a formula F that is linear in x with a symmetric positive matrix.

    Args:
        formula: the formula F, as in Genred.
        aliases: declarations of its variables.
        varinvalias: name of the variable that is solved for; b is given in its place.
        axis: 1 if that variable is a Vj (the sum runs over j), 0 if it is a Vi.
        dtype_acc, use_double_acc, sum_scheme: as in Genred.
        enable_chunks, rec_multVar_highdim, dtype, cuda_type, use_fast_math: accepted from KeOps' programs, ignored.

    Does not verify that the matrix is symmetric and positive. `K.solve(b)` does the same for a LazyTensor.
    """

    def __init__(
        self,
        formula: str,
        aliases: Sequence[str],
        varinvalias: str,
        axis: int = 0,
        dtype_acc: str = "auto",
        use_double_acc: bool = False,
        sum_scheme: str = "auto",
        enable_chunks: bool = True,
        rec_multVar_highdim: Any = None,
        dtype: Any = None,
        cuda_type: Any = None,
        use_fast_math: bool = True,
    ) -> None:
        accumulator = "float64" if use_double_acc else dtype_acc
        self._arguments = (formula, tuple(aliases), varinvalias, axis, accumulator, False, sum_scheme)
        declared = language.declare(aliases)
        names = {name: v for name, v in declared if name}
        if varinvalias not in names:
            raise ArgumentError(f"varinvalias={varinvalias!r} is not among the aliases {', '.join(names)}")
        expr = language.parse(formula, names)
        self.formula, self.axis = formula, axis
        self.names, signature = language.signature(declared, expr)
        unknown = names[varinvalias]
        wanted = COLUMN if axis == 1 else ROW
        if unknown.params[1] != wanted:
            raise ArgumentError(
                f"KernelSolve over axis {axis} solves for a variable {'Vi' if wanted == ROW else 'Vj'}; "
                f"{varinvalias!r} is another kind"
            )
        if expr.dim != unknown.dim:
            raise ShapeError(
                f"the formula {formula} has dimension {expr.dim}, the variable {varinvalias!r} that is solved for "
                f"{unknown.dim}; the matrix must be square"
            )
        self._check = Reducer(
            "Sum", expr, signature, axis, accumulator=accumulator, scheme=sum_scheme, names=self.names, formula=formula
        )
        self._position = int(unknown.params[0])
        self._form = _split(expr, signature, self._position, axis, *self._check._options)

    def __call__(
        self,
        *args: Any,
        backend: str = "auto",
        device_id: int = -1,
        alpha: Any = 1e-10,
        eps: float = 1e-6,
        ranges: Any = None,
        atol: float = 0.0,
        maxiter: int = 1000,
        rtol: float | None = None,
        preconditioner: Any = None,
        rank: int | None = None,
        info: bool = False,
        tolerance: float | None = None,
    ) -> Any:
        """Solve. Tensors give tensors, arrays give arrays; leading axes are batch.

        Args:
            args: the data of all variables by position, with b of shape (..., N, dim) in place of the unknown.
            backend, ranges: as in Genred. `device_id` is ignored.
            alpha: >= 0, added to the diagonal; a number, or a tensor that broadcasts against the batch.
            eps: relative tolerance: every column stops at |b - A x| <= max(eps |b|, atol). Gradients are as accurate.
            rtol: `eps` under its usual name.
            maxiter: cap; where it is met a ConvergenceWarning says so and the best iterate is returned.
            preconditioner: None; "nystrom", from `rank` random products; "cholesky", from `rank` columns chosen
                greedily; "fourier", from the `rank` largest Fourier modes of a kernel that is a smooth function of
                x - y; or a function r -> P^-1 r.
            rank: None: 50, and 2048 of "fourier".
            info: also return a SolveInfo.
            tolerance: relative l2 error of each product with the matrix, below `eps`; None: exact products.

        Differentiable in b, alpha and every tensor, to every order, in reverse and forward mode and under `torch.func`;
        each derivative costs one solve.
        """
        arrays = bool(args) and not any(isinstance(a, Tensor) for a in args)
        tensors = [interop.share(a, "KernelSolve") if isinstance(a, np.ndarray) else torch.as_tensor(a) for a in args]
        tensors = self._check._promoted(tensors)
        _, m, n = self._check._check(tensors)
        self._check.check_devices(tensors)
        if m != n:
            raise ShapeError(f"KernelSolve: the system must be square; got {m} rows i and {n} rows j in {self.formula}")
        options, _ = _options(
            {
                "eps": eps,
                "rtol": rtol,
                "atol": atol,
                "maxiter": maxiter,
                "preconditioner": preconditioner,
                "rank": rank,
                "tolerance": tolerance,
                "backend": self._check._backend(backend, tensors) if backend != "auto" else backend,
            }
        )
        b = tensors.pop(self._position)
        pattern = as_ranges(ranges, m, n)
        if pattern is not None and self.axis == 0:
            pattern = as_ranges(_swapped(pattern), n, m)
        found = _solve(self._form, options, pattern, b, alpha, tensors, info)
        if not arrays:
            return found
        return (found[0].numpy(), found[1]) if info else found.detach().numpy()

    def __reduce__(self) -> Any:
        return KernelSolve, self._arguments

    def __repr__(self) -> str:
        return f"KernelSolve: alpha x + sum over {'ij'[self.axis]} of {self.formula!r} = b"


def _swapped(p: Ranges) -> tuple[Tensor, ...]:
    return p.ranges_j, p.slices_j, p.redranges_i, p.ranges_i, p.slices_i, p.redranges_j


def _split(
    expr: Expr, signature: tuple[tuple[int, int], ...], position: int, axis: int, accumulator: str, scheme: str
) -> LinearForm:
    """The form of a formula whose argument `position` is the unknown; rows are those of the result."""
    n = len(signature)
    places = tuple(n - 1 if k == position else k - (k > position) for k in range(n))
    expr = renumber(expr, places)
    rest = tuple(s for k, s in enumerate(signature) if k != position)
    dim = signature[position][0]
    if axis == 0:
        expr = swap_roles(expr)
        rest = tuple((d, c if c == PARAMETER else 1 - c) for d, c in rest)
    unknown = variable(n - 1, dim, COLUMN)
    if expr.op == "Mult" and unknown in expr.args:  # K v: columns are systems of their own
        kernel = expr.args[1] if expr.args[0] is unknown else expr.args[0]
        if kernel.dim == 1 and kernel is not unknown and unknown not in set(walk(kernel)):
            return LinearForm(kernel, rest, "scalar", 1, 1, accumulator, scheme)
    return LinearForm(expr, rest, "linear", dim, dim, accumulator, scheme)
